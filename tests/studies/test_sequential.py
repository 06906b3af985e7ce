"""Runs one after another, each on all devices."""

import dataclasses

import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.studies import (
  ImageNetStudyConfig,
  Interrupted,
  imagenet_study,
  read_results,
  run_sequentially,
  runner,
  write_report,
)
from skipinit_jax.training import TrainConfig

CONFIG = ImageNetStudyConfig(
  methods=("skipinit",),
  batch_sizes=(32, 64),
  train=TrainConfig(
    model="residual_mlp", depth=2, width=8, batch_size=32, epochs=1, learning_rate=0.01
  ),
)


def test_runs_stop_and_go_on(tmp_path, monkeypatch, capsys):
  train = runner.train
  calls = []

  def interrupted(config, workdir):
    calls.append(config)
    if len(calls) == 2:
      return dataclasses.replace(train(config, tmp_path / "x"), status="interrupted")
    return train(config, workdir)

  study = imagenet_study(CONFIG)
  monkeypatch.setattr(runner, "train", interrupted)
  with pytest.raises(Interrupted):
    run_sequentially(study, tmp_path / "study")
  assert len(calls) == 2
  monkeypatch.setattr(runner, "train", train)
  results = run_sequentially(study, tmp_path / "study")
  assert [search.name for search in results.searches] == [
    f"skipinit/batch_{size}" for size in (32, 64)
  ]
  for search, run in zip(results.searches, results.runs, strict=True):
    assert run.search == search.name and run.status == "completed"
    # 1472 images make 46 batches of 32, and 23 of 64.
    assert run.step == 1472 // search.labels.batch_size
    assert run.learning_rate == 0.01 * search.labels.batch_size / 32
    assert run.test_accuracy <= run.test_top5_accuracy <= 1
    assert run.history["test"]["epoch"] == [1.0]
  printed = capsys.readouterr().out
  assert "Run 2 of 2: SkipInit, α = 0, batch 64, seed 0" in printed
  directory = tmp_path / "study/trials/skipinit/batch_32/rate_0.01/seed_0"
  finished = (directory / "result.json").stat().st_mtime_ns
  # What is finished is not trained again, and the report is made from it.
  again = run_sequentially(study, tmp_path / "study")
  assert again == results
  assert (directory / "result.json").stat().st_mtime_ns == finished
  write_report(again, tmp_path / "report")
  assert read_results(tmp_path / "report") == again


def test_all_cells_are_checked_before_the_first_is_trained(tmp_path):
  config = dataclasses.replace(CONFIG, batch_sizes=(32, 36))
  with pytest.raises(UsageError, match=r"batch 36: batch_size is 36.*8 devices"):
    run_sequentially(imagenet_study(config), tmp_path)
  assert not list(tmp_path.iterdir())
