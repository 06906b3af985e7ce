"""The regularization study from its flags to its report."""

import json

import pytest

SMALL = [
  "experiments.regularization_study",
  "--workers=1",
  "--config.methods=('skipinit',)",
  "--config.dropout_rates=(0.5,)",
  "--config.use_bias=(True,)",
  "--config.train.model=residual_mlp",
  "--config.train.depth=2",
  "--config.train.width=8",
  "--config.train.batch_size=736",
  "--config.train.epochs=1",
  "--config.search.learning_rates=(0.125,)",
  "--config.search.extend=False",
  "--config.search.num_seeds=1",
  "--config.search.best_of=1",
]


def test_study_and_its_report(run_program, tmp_path):
  done = run_program([*SMALL, f"--workdir={tmp_path}"], status=0)
  assert f"Report: {tmp_path / 'report.html'}, with its tables" in done.stdout
  assert "SkipInit, α = 0, biases, no L2" in done.stdout
  results = json.loads((tmp_path / "results.json").read_text())
  labels = {
    search["name"]: tuple(search["labels"].values()) for search in results["searches"]
  }
  assert labels == {
    "skipinit/biases/dropout_0.5": ("skipinit", True, 0.5, 5e-4),
    "skipinit_without_l2/biases/dropout_0.5": ("skipinit", True, 0.5, 0.0),
  }
  # L2 is no label only: the same seeds lose differently.
  assert len({run["train_loss"] for run in results["runs"]}) == 2
  for name in ("accuracy.md", "accuracy_by_dropout.png", "learning_curves.png"):
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.dropout_rates=(0.5, 1.5)", "dropout_rate is 1.5: it must be below 1."),
    ("--config.train.l2=0", "methods_without_l2 is ('skipinit',), but train.l2 is 0"),
    (
      "--config.search.best_of=2",
      "search.best_of is 2: it must be from 1 to num",
    ),
  ],
)
def test_bad_input_is_one_sentence(assert_refuses, flag, message):
  assert_refuses(SMALL, flag, message)
