import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import optax
import pytest

from skipinit_jax import data
from skipinit_jax.data.datasets import Split
from skipinit_jax.errors import UsageError
from skipinit_jax.files import read_json, write_json
from skipinit_jax.training import loop
from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.metrics import read_metrics
from tests.training.runs import (
  StopAt,
  bits,
  preprocess,
  rows_of,
  saved_state,
  train,
)

# 1472 training examples make 23 steps an epoch.
STEPS_PER_EPOCH = 23
CONFIG = TrainConfig(
  model="residual_mlp",
  depth=4,
  width=16,
  method="batch_norm",
  dropout_rate=0.1,
  drop_path=0.2,
  crop_padding=1,
  label_smoothing=0.1,
  mixup=0.2,
  ema_decay=0.95,
  batch_size=64,
  epochs=3,
  learning_rate=0.05,
  constant_epochs=1,
  eval_every_epochs=2,
  checkpoint_every_seconds=0,
)
# The rate grows from 10^-6 to 1 in the first epoch and to 10^6 in the second.
DIVERGING = dataclasses.replace(
  CONFIG,
  method="unnormalized",
  schedule="exponential",
  learning_rate=1e-6,
  constant_epochs=TrainConfig.constant_epochs,
  growth_per_epoch=1e6,
)


def saved_bits(workdir):
  return bits(saved_state(workdir, CONFIG))


def files_of(folder):
  return {path: path.stat().st_mtime_ns for path in pathlib.Path(folder).rglob("*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run that nothing disturbed: its result and its workdir, not to be changed."""
  workdir = tmp_path_factory.mktemp("finished") / "new" / "run"
  return train(CONFIG, workdir), workdir


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of that run without its result, as if killed after the last checkpoint."""
  workdir = shutil.copytree(finished[1], tmp_path / "run")
  (workdir / "result.json").unlink()
  return workdir


def test_result(finished):
  result, workdir = finished
  assert (result.status, result.step) == ("completed", 3 * STEPS_PER_EPOCH)
  # Stem, four blocks of a layer and its normalizer, the head's normalizer, classifier.
  assert result.num_parameters == 64 * 16 + 4 * (16 * 16 + 2 * 16) + 2 * 16 + 17 * 10
  assert result.device == "2 x cpu"
  assert result.images_per_second > 0
  assert result.seconds_to_first_step > 0
  lists = {"l2_exempt": [], "freeze": []}
  assert TrainConfig(**result.config) == dataclasses.replace(CONFIG, **lists)
  for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
    assert result.versions[package] == importlib.metadata.version(package)
  assert read_json(workdir / "result.json") == dataclasses.asdict(result)
  assert set(os.listdir(workdir)) == {
    "lock",
    "checkpoints",
    "config.json",
    "metrics.jsonl",
    "record.json",
    "result.json",
    "tensorboard",
  }
  assert os.listdir(workdir / "tensorboard")


def test_accuracy_by_hand(finished):
  result, workdir = finished
  step, state = saved_state(workdir, CONFIG)
  assert step == int(state.step) == 3 * STEPS_PER_EPOCH
  test = data.load("digits").test
  logits = CONFIG.make_model(10).apply(
    {"params": state.params, **state.model_state}, preprocess(test.images), train=False
  )
  correct = np.argmax(logits, -1) == test.labels
  assert result.test_accuracy == pytest.approx(float(correct.mean()), abs=1e-6)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, test.labels)
  assert result.test_loss == pytest.approx(float(losses.mean()), rel=1e-4)
  # It learned something.
  assert result.test_accuracy > 0.3


def test_metrics(finished):
  result, workdir = finished
  rows = read_metrics(workdir)
  assert [(row["step"], row["kind"]) for row in rows] == [
    (23, "train"),
    (46, "train"),
    (46, "eval"),
    (69, "train"),
    # The last epoch is evaluated even where no multiple of eval_every_epochs.
    (69, "eval"),
  ]
  train_rows = [row for row in rows if row["kind"] == "train"]
  assert [row["epoch"] for row in train_rows] == [1, 2, 3]
  # The rate of the epoch's last step.
  assert [row["learning_rate"] for row in train_rows] == [0.05, 0.025, 0.0125]
  assert all(row["images_per_second"] > 0 for row in train_rows)
  losses = [row["loss"] for row in train_rows]
  assert losses == sorted(losses, reverse=True)
  assert losses[-1] == result.train_loss
  assert train_rows[-1]["accuracy"] == result.train_accuracy
  for name in ("loss", "accuracy", "top5_accuracy"):
    assert rows[-1][name] == getattr(result, f"test_{name}")


def test_finished_run_is_not_repeated(finished, monkeypatch):
  result, workdir = finished
  before = files_of(workdir)
  monkeypatch.setattr(loop, "Trainer", None)
  # What does not decide the result may change.
  moved = dataclasses.replace(CONFIG, shard_params=True, checkpoint_every_seconds=9)
  assert train(CONFIG, workdir) == train(moved, workdir) == result
  other = dataclasses.replace(CONFIG, learning_rate=0.5)
  with pytest.raises(UsageError, match=r"learning_rate is 0\.05 there and 0\.5"):
    train(other, workdir)
  assert files_of(workdir) == before


def test_killed_after_its_last_checkpoint(finished, copied):
  expected, workdir = finished
  result = train(CONFIG, copied)
  assert result == dataclasses.replace(
    expected, images_per_second=None, seconds_to_first_step=None
  )
  assert read_metrics(copied) == read_metrics(workdir)
  assert saved_bits(copied) == saved_bits(workdir)


def test_old_workdir_has_no_record_and_fewer_fields(finished, copied):
  record = (copied / "record.json").read_bytes()
  (copied / "record.json").unlink()
  config = read_json(copied / "config.json")
  # It had no rates by role, and no warm-up in this schedule.
  config = {name: config[name] for name in config if "rate_factor" not in name}
  write_json(copied / "config.json", config | {"warmup_epochs": 1.0})
  assert train(CONFIG, copied).test_accuracy == finished[0].test_accuracy
  assert (copied / "record.json").read_bytes() == record
  (copied / "record.json").unlink()
  (copied / "result.json").unlink()
  write_json(copied / "config.json", config | {"adaptive_clip": 0.1})
  with pytest.raises(UsageError, match=r"adaptive_clip .* cannot be resumed"):
    train(dataclasses.replace(CONFIG, adaptive_clip=0.1), copied)


def changed_digits(self):
  dataset = data.load("digits")
  images = dataset.train.images.copy()
  images[5, 3, 3, 0] ^= 1
  return dataclasses.replace(dataset, train=Split(images, dataset.train.labels))


@pytest.mark.parametrize("has_result", [True, False])
def test_other_data(finished, copied, monkeypatch, has_result):
  workdir = finished[1] if has_result else copied
  monkeypatch.setattr(TrainConfig, "load_dataset", changed_digits)
  before = files_of(workdir)
  # One bit of one pixel.
  with pytest.raises(UsageError, match=r'other data.*: data\.train\.sha256 is "[^,]*;'):
    train(CONFIG, workdir)
  assert files_of(workdir) == before


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("jax_threefry_partitionable", False),
    ("jax_default_prng_impl", "rbg"),
    ("jax_default_matmul_precision", "highest"),
  ],
)
def test_other_settings_of_jax(copied, name, value):
  former = getattr(jax.config, name)
  jax.config.update(name, value)
  try:
    with pytest.raises(UsageError, match=f"settings: jax.{name} is .* there and"):
      train(CONFIG, copied)
  finally:
    jax.config.update(name, former)


# Whenever the request comes, between any two lines: the loop asks once a dispatch.
@pytest.mark.parametrize("asked", [0, 3])
def test_stopped_run_is_saved_and_resumed(finished, tmp_path, asked):
  expected, workdir = finished
  result = train(CONFIG, tmp_path, stop=StopAt(asked))
  assert result.status == "interrupted"
  assert result.test_accuracy is None
  if asked == 0:
    assert result.step == 0
    assert result.seconds_to_first_step is None
  else:
    assert 0 < result.step <= STEPS_PER_EPOCH
    assert saved_state(tmp_path, CONFIG)[0] == result.step
  # Its result does not pass for that of a finished run.
  result = train(CONFIG, tmp_path)
  assert result.test_accuracy == expected.test_accuracy
  assert rows_of(tmp_path) == rows_of(workdir)
  assert saved_bits(tmp_path) == saved_bits(workdir)


def test_diverged_run(tmp_path):
  result = train(DIVERGING, tmp_path)
  assert result.status == "diverged"
  assert STEPS_PER_EPOCH < result.step < 3 * STEPS_PER_EPOCH
  assert (result.test_loss, result.test_accuracy) == (None, None)
  assert json.loads((tmp_path / "result.json").read_bytes())["status"] == "diverged"
  # The last row is that of the step, the last checkpoint that of an epoch before.
  rows = read_metrics(tmp_path)
  assert (rows[-1]["step"], rows[-1]["kind"]) == (result.step, "train")
  assert rows[-1]["learning_rate"] == pytest.approx(
    1e-6 * 1e6 ** ((result.step - 1) / STEPS_PER_EPOCH), rel=1e-4
  )
  step, state = saved_state(tmp_path, DIVERGING)
  assert step == (result.step - 1) // STEPS_PER_EPOCH * STEPS_PER_EPOCH
  for leaf in jax.tree.leaves((state.params, state.opt_state, state.sums)):
    assert np.isfinite(leaf).all()

  # Without its result it diverges again, at the same step.
  (tmp_path / "result.json").unlink()
  again = train(DIVERGING, tmp_path)
  assert (again.status, again.step) == ("diverged", result.step)
  assert read_metrics(tmp_path)[-1]["step"] == result.step


@pytest.mark.parametrize(
  "fields",
  [
    {"model": "wide_resnet", "depth": 17},
    {"batch_size": 2048},
    {"dataset": "imagenet2012", "crop_padding": 0, "data_dir": "/nowhere"},
  ],
)
def test_bad_configuration_makes_no_workdir(fields, tmp_path):
  workdir = tmp_path / "run"
  with pytest.raises(UsageError):
    train(dataclasses.replace(CONFIG, **fields), workdir)
  assert not workdir.exists()


@pytest.mark.parametrize("name", ["/dev/null/run", "a" * 300, "gs://bucket/run"])
def test_workdir_that_cannot_be(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UsageError, match=r"^The workdir .*\.$"):
    train(CONFIG, name)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", ['{"status": "completed"}', "{"])
def test_file_that_is_no_result(content, tmp_path):
  (tmp_path / "result.json").write_text(content)
  with pytest.raises(UsageError, match=r"result\.json is (damaged|not a result)"):
    train(CONFIG, tmp_path)


def test_stopwatch(monkeypatch):
  now = [10.0]
  monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
  stopwatch = loop._Stopwatch(batch_size=8)
  now[0] += 26
  stopwatch.add(1, seconds=19.0)
  # The first step compiles: it counts for itself only.
  assert stopwatch.images_per_second is None
  assert stopwatch.steps_in(0.5) == 1
  now[0] += 1000
  stopwatch.add(1, seconds=0.25)
  stopwatch.add(3, seconds=0.25)
  assert stopwatch.seconds_to_first_step == 26
  assert stopwatch.images_per_second == 4 * 8 / 0.5
  assert stopwatch.steps_in(1.0) == 8
  # Slow steps are still taken.
  assert stopwatch.steps_in(0.01) == 1
