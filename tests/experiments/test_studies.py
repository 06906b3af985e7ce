"""The programs of studies from their flags to their reports."""

import json

import pytest

from skipinit_jax.data.prepare import sample_photos

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
  """Runs a program; returns what it printed, and its runs by their search."""
  command = [f"experiments.{program}", *flags, f"--workdir={workdir}"]
  done = run_program(command, status=0)
  assert f"Report: {workdir / 'report.html'}, with its tables" in done.stdout
  results = json.loads((workdir / "results.json").read_text())
  assert f"-m experiments.{program}" in results["command"]
  return done.stdout, {run["search"]: run for run in results["runs"]}


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
  printed, runs = run(run_program, program, tmp_path, *SMALL, *flags)
  assert words in printed
  assert {
    name: (run["learning_rate"], run["step"]) for name, run in runs.items()
  } == expected
  # Alpha, L2 and steps are no labels only: the same seeds lose differently.
  assert len({run["train_loss"] for run in runs.values()}) == len(expected)


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
  printed, runs = run(run_program, "imagenet", workdir, *flags)
  assert "Run 1 of 1: Regularized SkipInit, batch 32, seed 0" in printed
  # 250 photographs make 7 batches of 32; the rate is the preset's, at 32.
  (only,) = runs.values()
  assert (only["step"], only["learning_rate"]) == (14, 0.05)
  assert 0 <= only["test_accuracy"] <= only["test_top5_accuracy"] <= 1
  results = json.loads((workdir / "results.json").read_text())
  # Ten classes and 50 photographs: chance and three standard errors.
  assert results["threshold"] == pytest.approx(0.1 + 3 * (0.1 * 0.9 / 50) ** 0.5)
  page = (workdir / "report.html").read_text()
  assert "Methods and batch sizes on sample photographs" in page


DEPTH = [
  "experiments.depth_study",
  "--config.methods=('skipinit',)",
  "--config.wide_resnet_depths=()",
  "--config.residual_mlp_depths=(2,)",
  "--config.residual_mlp.width=16",
]


def test_finished_study_is_not_repeated(run_program, tmp_path):
  command = [
    *DEPTH,
    "--config.residual_mlp_search.learning_rates=(0.1, 1e9)",
    f"--workdir={tmp_path}",
    "--config.residual_mlp.epochs=2",
  ]
  first = run_program([*command, "--workers=1"], status=0)
  assert "rate 1e+09, seed 0: diverged at step" in first.stderr
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["name"] == "depth_study"
  assert "-m experiments.depth_study" in results["command"]
  assert results["config"]["residual_mlp"]["epochs"] == 2
  (search,) = results["searches"]
  assert search["labels"]["depth"] == 2 and search["labels"]["method"] == "skipinit"
  assert (search["num_runs"], search["num_diverged"]) == (2, 1)
  assert (search["optimum"]["learning_rate"], search["trains"]) == (0.1, True)
  runs = {run["learning_rate"]: run["status"] for run in results["runs"]}
  assert runs == {0.1: "completed", 1e9: "diverged"}

  trials = list(tmp_path.glob("trials/**/result.json"))
  assert len(trials) == 2
  times = [path.stat().st_mtime_ns for path in trials]
  # How many processes there are is not part of a study.
  second = run_program([*command, "--workers=2"], status=0)
  assert "2 trials are done already." in second.stderr
  assert [path.stat().st_mtime_ns for path in trials] == times
  again = json.loads((tmp_path / "results.json").read_text())
  assert again.pop("command") != results.pop("command")
  assert again == results
