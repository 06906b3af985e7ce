"""The report of one training run."""

import dataclasses
import math
import shutil

import jax
import pytest

from skipinit_jax import studies
from skipinit_jax.errors import UsageError
from skipinit_jax.files import read_json, to_json, write_json
from skipinit_jax.studies.run_report import make_run_report, read_result, result_table
from skipinit_jax.training import TrainConfig, train
from skipinit_jax.training.metrics import read_metrics
from tests.studies.results import contents_of

CONFIG = TrainConfig(
  model="residual_mlp",
  depth=3,
  width=8,
  batch_size=736,
  epochs=3,
  eval_every_epochs=2,
  signal_every_steps=2,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a finished run, not to be changed."""
  workdir = tmp_path_factory.mktemp("run")
  train(CONFIG, workdir, show_progress=False, devices=jax.devices()[:1])
  return workdir


@pytest.fixture
def copied(run, tmp_path):
  return shutil.copytree(run, tmp_path / "run")


def changed_result(workdir, **fields):
  path = workdir / "result.json"
  write_json(path, read_json(path) | fields)


def test_report_of_a_run(run):
  result = read_result(run)
  report = make_run_report(run, "the command")
  assert report.title == "MLP 3-8, SkipInit, α = 0"
  accuracy = f"{100 * result.test_accuracy:.2f}"
  assert report.lead.endswith(
    f"highest learning rate of 2⁻⁵. Test accuracy {accuracy} % after 6 steps."
  )
  assert report.config == to_json(dataclasses.asdict(CONFIG))
  assert report.versions["jax"] == jax.__version__
  contents = contents_of(report)
  assert list(contents) == ["result", "learning_curves", "signal", "environment"]
  table = dict(contents["result"].rows)
  assert table["status"] == "completed"
  assert (table["steps"], table["test accuracy (%)"]) == ("6", accuracy)
  assert table["training loss"] == f"{result.train_loss:.4f}"


def test_curves_are_the_metrics(run):
  rows = read_metrics(run)
  figure = contents_of(make_run_report(run, ""))["learning_curves"].figure
  for axes, name, factor in zip(
    figure.axes, ("loss", "accuracy"), (1, 100), strict=True
  ):
    for line, kind in zip(axes.lines, ("train", "eval"), strict=True):
      mine = [row for row in rows if row["kind"] == kind]
      # Evaluated every second epoch, and after the last.
      assert len(mine) == {"train": 3, "eval": 2}[kind]
      assert list(line.get_xdata()) == [row["epoch"] for row in mine]
      expected = [factor * row[name] for row in mine]
      assert list(line.get_ydata()) == pytest.approx(expected, rel=1e-3)


def test_no_signal_no_heat_maps(copied):
  lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
  kept = [line for line in lines if '"signal"' not in line]
  assert len(lines) - len(kept) == 4
  (copied / "metrics.jsonl").write_text("".join(kept))
  contents = contents_of(make_run_report(copied, ""))
  assert list(contents) == ["result", "learning_curves", "environment"]
  # Runs of older versions say nothing about it.
  changed_result(copied, environment={})
  assert "environment" not in contents_of(make_run_report(copied, ""))


def test_diverged_run(copied):
  nothing = dict.fromkeys(("test_loss", "test_accuracy", "images_per_second"))
  changed_result(copied, status="diverged", train_loss=math.nan, **nothing)
  report = make_run_report(copied, "")
  assert "Diverged" in report.lead and report.lead.endswith("after 6 steps.")
  table = dict(result_table(read_result(copied)).rows)
  assert (table["status"].text, table["status"].mark) == ("diverged", "bad")
  assert table["test loss"] == table["training images per second"] == "none"
  assert table["training loss"] == "nan"


def test_unfinished_runs(copied):
  def refused(words):
    assert studies.is_run(copied)
    with pytest.raises(UsageError, match=words):
      studies.write_run_report(copied, copied / "report")
    assert not (copied / "report").exists()

  unfinished = f"The run in {copied} is not finished: run the same command again"
  changed_result(copied, status="interrupted")
  refused(unfinished)
  for name in ("result.json", "metrics.jsonl"):
    (copied / name).unlink()
    refused(unfinished)
  (copied / "result.json").write_text("{}")
  refused("is damaged or of another version")
  assert not studies.is_run(copied.parent / "missing")
