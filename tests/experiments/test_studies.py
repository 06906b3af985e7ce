"""The programs of studies from their flags to their reports."""

import pytest

from skipinit_jax.data.prepare import sample_photos
from skipinit_jax.files import read_json

# One small network at one rate.
SMALL = [
  "--workers=1",
  "--config.train.model=residual_mlp",
  "--config.train.depth=2",
  "--config.train.width=8",
  "--config.train.epochs=1",
  "--config.train.eval_every_epochs=1",
  "--config.search.learning_rates=(0.125,)",
  "--config.search.extend=False",
  "--config.search.num_seeds=1",
  "--config.search.best_of=1",
]


def run(run_program, program, workdir, *flags):
  """Runs a program; returns what it printed, and its results."""
  command = [f"experiments.{program}", *flags, f"--workdir={workdir}"]
  done = run_program(command, status=0)
  assert f"Report: {workdir / 'report.html'}, with its tables" in done.stdout
  results = read_json(workdir / "results.json")
  assert f"-m experiments.{program}" in results["command"]
  return done, results


BATCHES_OF_736 = "--config.train.batch_size=736"


@pytest.mark.parametrize(
  ("program", "flags", "words", "expected"),
  [
    (
      "batch_size_study",
      [
        "--config.methods=('skipinit',)",
        "--config.batch_sizes=(736,)",
        "--config.train.batch_size=368",
        "--config.search.until_unstable=False",
      ],
      "batch 736, same steps",
      # 1472 images are 4 batches of 368, and 2 of 736.
      {
        "same_epochs/batch_736/skipinit": (0.25, 2),
        "same_steps/batch_736/skipinit": (0.25, 4),
      },
    ),
    (
      "branch_scale_study",
      [
        "--config.alphas=(0.0, 0.5)",
        "--config.depths=(2,)",
        "--config.train.depth=16",
        BATCHES_OF_736,
      ],
      "MLP 2-8: Batch norm, divide by √2 trains.",
      {
        "residual_mlp_2/batch_norm/constant/alpha_0.0": (0.125, 2),
        "residual_mlp_2/batch_norm/constant/alpha_0.5": (0.125, 2),
        "residual_mlp_2/batch_norm_divide_by_sqrt2/as_it_is": (0.125, 2),
      },
    ),
    (
      "regularization_study",
      [
        "--config.methods=('skipinit',)",
        "--config.dropout_rates=(0.5,)",
        "--config.use_bias=(True,)",
        BATCHES_OF_736,
      ],
      "SkipInit, α = 0, biases, no L2",
      {
        "skipinit/biases/dropout_0.5": (0.125, 2),
        "skipinit_without_l2/biases/dropout_0.5": (0.125, 2),
      },
    ),
  ],
)
def test_every_cell_is_trained(program, flags, words, expected, run_program, tmp_path):
  done, results = run(run_program, program, tmp_path, *SMALL, *flags)
  assert words in done.stdout
  runs = results["runs"]
  assert {
    each["search"]: (each["learning_rate"], each["step"]) for each in runs
  } == expected
  # Alpha, L2 and steps are no labels only: the same seeds lose differently.
  assert len({each["train_loss"] for each in runs}) == len(runs) == len(expected)


def test_imagenet_on_small_photographs(run_program, tmp_path):
  data_dir, workdir = str(tmp_path / "data"), tmp_path / "run"
  sample_photos.prepare(data_dir)
  flags = [
    "--config=sample",
    "--config.methods=('regularized_skipinit',)",
    "--config.batch_sizes=(32,)",
    "--config.train.model=residual_mlp",
    "--config.train.depth=2",
    "--config.train.width=16",
    "--config.train.image_size=8",
    "--config.train.data_workers=0",
    f"--config.train.data_dir={data_dir}",
  ]
  done, results = run(run_program, "imagenet", workdir, *flags)
  assert "Run 1 of 1: Regularized SkipInit, batch 32, seed 0" in done.stdout
  # 250 photographs make 7 batches of 32; the rate is the preset's, at 32.
  (only,) = results["runs"]
  assert (only["step"], only["learning_rate"]) == (14, 0.05)
  assert 0 <= only["test_accuracy"] <= only["test_top5_accuracy"] <= 1
  # Ten classes and 50 photographs: chance and three standard errors.
  assert results["threshold"] == pytest.approx(0.1 + 3 * (0.1 * 0.9 / 50) ** 0.5)
  page = (workdir / "report.html").read_text()
  assert "Methods and batch sizes on sample photographs" in page


def test_a_finished_study_is_not_repeated(run_program, tmp_path):
  flags = [
    "--config.methods=('skipinit',)",
    "--config.wide_resnet_depths=()",
    "--config.residual_mlp_depths=(2,)",
    "--config.residual_mlp.width=16",
    "--config.residual_mlp.epochs=2",
    "--config.residual_mlp_search.learning_rates=(0.1, 1e9)",
  ]
  first, results = run(run_program, "depth_study", tmp_path, "--workers=1", *flags)
  assert "rate 1e+09, seed 0: diverged at step" in first.stderr
  (search,) = results["searches"]
  assert (search["num_runs"], search["num_diverged"]) == (2, 1)
  assert (search["optimum"]["learning_rate"], search["trains"]) == (0.1, True)

  trials = list(tmp_path.glob("trials/**/result.json"))
  assert len(trials) == 2
  times = [path.stat().st_mtime_ns for path in trials]
  # How many processes there are is not part of a study.
  second, again = run(run_program, "depth_study", tmp_path, "--workers=2", *flags)
  assert "2 trials are done already." in second.stderr
  assert [path.stat().st_mtime_ns for path in trials] == times
  assert again.pop("command") != results.pop("command")
  assert again == results
