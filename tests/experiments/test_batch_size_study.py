"""The batch-size study from its flags to its report."""

import json

import pytest

SMALL = [
  "experiments.batch_size_study",
  "--workers=1",
  "--config.methods=('skipinit',)",
  "--config.batch_sizes=(736,)",
  "--config.train.model=residual_mlp",
  "--config.train.depth=2",
  "--config.train.width=8",
  "--config.train.batch_size=368",
  "--config.train.epochs=1",
  "--config.search.learning_rates=(0.125,)",
  "--config.search.extend=False",
  "--config.search.until_unstable=False",
  "--config.search.num_seeds=1",
  "--config.search.best_of=1",
]


def test_study_and_its_report(run_program, tmp_path):
  done = run_program([*SMALL, f"--workdir={tmp_path}"], status=0)
  assert f"Report: {tmp_path / 'report.html'}, with its tables" in done.stdout
  assert "batch 736, same steps" in done.stdout
  results = json.loads((tmp_path / "results.json").read_text())
  runs = {run["search"]: (run["learning_rate"], run["step"]) for run in results["runs"]}
  # 1472 images are 4 batches of 368, and 2 of 736.
  assert runs == {
    "same_epochs/batch_736/skipinit": (0.25, 2),
    "same_steps/batch_736/skipinit": (0.25, 4),
  }
  for name in ("rates.md", "batch_size_same_steps.png", "batch_size_same_epochs.png"):
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    (
      "--config.batch_sizes=(368, 2000)",
      "batch_sizes has 2000: each must be from 1 to 1472, the number of training "
      "examples.",
    ),
    ("--config.methods=('skipint',)", "Unknown method 'skipint' (did you mean 'skipin"),
    ("--config.search.learning_rates=('a',)", "search.learning_rates has 'a': each mu"),
  ],
)
def test_bad_input_is_one_sentence(assert_refuses, flag, message):
  assert_refuses(SMALL, flag, message)
