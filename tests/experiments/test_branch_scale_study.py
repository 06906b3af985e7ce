"""The branch-scale study from its flags to its report."""

import json

import pytest

SMALL = [
  "experiments.branch_scale_study",
  "--workers=1",
  "--config.alphas=(0.0, 0.5)",
  "--config.depths=(2,)",
  "--config.train.width=8",
  "--config.train.batch_size=736",
  "--config.train.epochs=1",
  "--config.train.eval_every_epochs=1",
  "--config.search.learning_rates=(0.125,)",
  "--config.search.extend=False",
  "--config.search.num_seeds=1",
  "--config.search.best_of=1",
]


def test_study_and_its_report(run_program, tmp_path):
  done = run_program([*SMALL, f"--workdir={tmp_path}"], status=0)
  assert f"Report: {tmp_path / 'report.html'}, with its tables" in done.stdout
  assert "MLP 2-8: Batch norm, divide by √2 trains." in done.stdout
  results = json.loads((tmp_path / "results.json").read_text())
  losses = {run["search"]: run["train_loss"] for run in results["runs"]}
  assert set(losses) == {
    "residual_mlp_2/batch_norm/constant/alpha_0.0",
    "residual_mlp_2/batch_norm/constant/alpha_0.5",
    "residual_mlp_2/batch_norm_divide_by_sqrt2/as_it_is",
  }
  # Alpha is no label only: the same seeds lose differently.
  assert len(set(losses.values())) == 3
  for name in ("accuracy.md", "accuracy_by_alpha.png", "learning_curves.png"):
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.alphas=(-1.0,)", "alpha is -1.0: it must be finite and not negative."),
    ("--config.train.learnable_alpha=True", "train.learnable_alpha is True, which"),
  ],
)
def test_bad_input_is_one_sentence(assert_refuses, flag, message):
  assert_refuses(SMALL, flag, message)
