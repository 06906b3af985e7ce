"""The ImageNet program from its flags to its report, on small photographs."""

import json

import pytest

from experiments.configs.imagenet import CONFIGS
from skipinit_jax.data.prepare import sample_photos

SMALL = [
  "experiments.imagenet",
  "--config=sample",
  "--config.train.model=residual_mlp",
  "--config.train.depth=2",
  "--config.train.width=16",
  "--config.train.image_size=8",
  "--config.train.data_workers=0",
  "--config.batch_sizes=(32,)",
]


def test_from_flags_to_report(run_program, tmp_path):
  data_dir = str(tmp_path / "data")
  sample_photos.prepare(data_dir)
  workdir = tmp_path / "run"
  command = [
    *SMALL,
    f"--workdir={workdir}",
    f"--config.train.data_dir={data_dir}",
  ]
  result = run_program(command, status=0)
  assert "Run 2 of 2: Regularized SkipInit, batch 32, seed 0" in result.stdout
  results = json.loads((workdir / "results.json").read_text())
  assert results["name"] == "imagenet_study"
  assert "-m experiments.imagenet" in results["command"]
  # Ten classes and 50 photographs: chance and three standard errors.
  assert results["threshold"] == pytest.approx(0.1 + 3 * (0.1 * 0.9 / 50) ** 0.5)
  runs = {run["search"]: run for run in results["runs"]}
  assert set(runs) == {"batch_norm/batch_32", "regularized_skipinit/batch_32"}
  for run in runs.values():
    # 250 photographs make 7 batches of 32; the rate is the preset's, at 32.
    assert (run["step"], run["learning_rate"]) == (14, 0.05)
    assert 0 <= run["test_accuracy"] <= run["test_top5_accuracy"] <= 1
  page = (workdir / "report.html").read_text()
  assert "Methods and batch sizes on sample photographs" in page
  # Finished runs are not repeated, and the report can be made elsewhere.
  trials = sorted(workdir.glob("trials/**/result.json"))
  times = [path.stat().st_mtime_ns for path in trials]
  report = ["experiments.report", f"--workdir={workdir}", f"--output={tmp_path / 'o'}"]
  run_program(report, status=0)
  assert (tmp_path / "o" / "report.html").read_text() == page
  run_program(command, status=0)
  assert [path.stat().st_mtime_ns for path in trials] == times


def test_missing_data_is_one_sentence(run_program, tmp_path):
  arguments = [f"--workdir={tmp_path / 'run'}", "--config.train.data_dir=/nowhere"]
  result = run_program(["experiments.imagenet", *arguments], status=1)
  assert "ILSVRC2012_img_train.tar" in result.stderr
  assert "download_and_prepare" in result.stderr
  assert "Traceback" not in result.stderr
  assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_is_one_sentence(run_program, tmp_path):
  result = run_program(
    [*SMALL, f"--workdir={tmp_path}", "--config.train.accumulation_steps=3"], status=1
  )
  assert "batch_size 32 is not a multiple of accumulation_steps 3" in result.stderr
  assert "Traceback" not in result.stderr


def test_presets_name_their_data():
  assert {name: make().train.dataset for name, make in CONFIGS.items()} == {
    "imagenet2012": "imagenet2012",
    "sample": "sample_photos",
  }
