"""The signal during training: what is written when, and that nothing else changes."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skipinit_jax import data
from skipinit_jax.analysis import Signal, measure
from skipinit_jax.data import augmentation
from skipinit_jax.training import TrainConfig, loop
from skipinit_jax.training.signal_log import SignalLog
from tests.training.runs import StopAt, bits, rows_of, saved_state, train

# 1472 training examples make 4 steps an epoch.
BATCH_SIZE = 368
CONFIG = TrainConfig(
  model="residual_mlp",
  depth=3,
  width=16,
  method="skipinit",
  dropout_rate=0.1,
  crop_padding=1,
  batch_size=BATCH_SIZE,
  epochs=2,
  learning_rate=0.05,
  checkpoint_every_seconds=0,
  signal_every_steps=3,
)
WITHOUT = dataclasses.replace(CONFIG, signal_every_steps=0)
NAMES = [f"stack/blocks/{index}" for index in range(3)]


def signals(workdir):
  return rows_of(workdir, "signal")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The workdir of a run with signals, not to be changed."""
  workdir = tmp_path_factory.mktemp("finished")
  train(CONFIG, workdir)
  return workdir


def test_rows(finished):
  rows = signals(finished)
  # Every third of eight steps, step 0 included, and the last.
  assert [(row["step"], row["epoch"]) for row in rows] == [
    (0, 0.0),
    (3, 0.75),
    (6, 1.5),
    (8, 2.0),
  ]
  assert rows[0]["blocks"] == NAMES
  assert not any("blocks" in row for row in rows[1:])
  # SkipInit starts with branches that are zero.
  assert rows[0]["alpha"] == rows[0]["branch_to_skip"] == [0, 0, 0]
  _, state = saved_state(finished, CONFIG)
  alphas = state.params["stack"]["blocks"]["branch_scale"]["alpha"]
  np.testing.assert_allclose(rows[-1]["alpha"], alphas, rtol=1e-4)
  assert np.abs(alphas).min() > 1e-4


def measured_here(state, config, size):
  """Measures the first examples of the step that the state would take next.

  The order of the examples and the augmentation are written down again.
  """
  dataset = data.load("digits")
  keys = jax.random.split(jax.random.wrap_key_data(state.key_data), 3)
  step = int(state.step)
  order = np.asarray(
    jax.random.permutation(jax.random.fold_in(keys[0], step // 4), jnp.arange(1472))
  )
  rows = order[step % 4 * BATCH_SIZE :][:BATCH_SIZE]
  crop_key, _ = jax.random.split(jax.random.fold_in(keys[1], step))
  images = augmentation.normalize(
    augmentation.pad_and_crop(crop_key, jnp.asarray(dataset.train.images[rows]), 1),
    dataset.mean,
    dataset.std,
  )[:size]
  labels = dataset.train.labels[rows][:size]
  return measure.signal(
    config.make_model(10),
    {"params": state.params, **state.model_state},
    images,
    loss=lambda logits: optax.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean(),
    key=jax.random.fold_in(keys[2], step),
    train=True,
  )


@pytest.mark.parametrize(
  ("method", "accumulation_steps"), [("skipinit", 1), ("batch_norm", 2)]
)
def test_values_are_those_of_the_next_batch(
  method, accumulation_steps, finished, tmp_path
):
  config = dataclasses.replace(
    CONFIG, method=method, accumulation_steps=accumulation_steps
  )
  if config != CONFIG:
    train(config, tmp_path)
  workdir = finished if config == CONFIG else tmp_path
  row = signals(workdir)[-1]
  # The first part of an accumulated batch is measured.
  size = BATCH_SIZE // accumulation_steps
  signal = measured_here(saved_state(workdir, config)[1], config, size)
  np.testing.assert_allclose(row["branch_to_skip"], signal.branch_to_skip, rtol=1e-3)
  np.testing.assert_allclose(
    row["gradient_rms"], np.sqrt(signal.gradient_second_moment[1:]), rtol=1e-3
  )
  assert ("alpha" in row) == (method == "skipinit")


def test_training_is_the_same_without(finished, tmp_path):
  train(WITHOUT, tmp_path)
  assert signals(tmp_path) == []
  assert rows_of(tmp_path) == rows_of(finished, "train", "eval")
  assert bits(saved_state(tmp_path, WITHOUT)) == bits(saved_state(finished, CONFIG))


# Stops before the first step and after step 4.
@pytest.mark.parametrize(("asked", "written"), [(0, 1), (3, 2)])
def test_resumed_run_has_each_row_once(asked, written, finished, tmp_path, monkeypatch):
  monkeypatch.setattr(loop._Stopwatch, "steps_in", lambda *_: 2)
  assert train(CONFIG, tmp_path, stop=StopAt(asked)).status == "interrupted"
  assert len(signals(tmp_path)) == written
  assert train(CONFIG, tmp_path).status == "completed"
  assert signals(tmp_path) == signals(finished)


def test_switched_on_when_resumed(finished, tmp_path):
  assert train(WITHOUT, tmp_path, stop=StopAt(1)).step == 1
  train(CONFIG, tmp_path)
  expected = signals(finished)[1:]
  # The first of the rows names the blocks.
  assert signals(tmp_path) == [expected[0] | {"blocks": NAMES}, *expected[1:]]


def test_diverged_run_has_rows_until_then(tmp_path):
  config = dataclasses.replace(CONFIG, learning_rate=1e30, signal_every_steps=1)
  result = train(config, tmp_path)
  assert result.status == "diverged"
  assert [row["step"] for row in signals(tmp_path)] == list(range(result.step))


@pytest.mark.parametrize(
  ("every_steps", "written", "stops"),
  [(0, [], [10]), (4, [0, 4, 8, 10], [4, 8, 10]), (5, [0, 5, 10], [5, 10])],
)
def test_row_has_five_digits_and_what_is_not_finite(every_steps, written, stops):
  absent = dict.fromkeys(field.name for field in dataclasses.fields(Signal))
  measured = {
    "names": ("a", "b", "c"),
    "branch_variance": jnp.array([1, jnp.inf, jnp.nan]),
    "skip_variance": jnp.array([3, 1, 1]),
    "gradient_second_moment": jnp.array([9, 1.23456789e-12**2, 0, 123456.7**2]),
  }
  rows = {}
  log = SignalLog(
    types.SimpleNamespace(
      kinds=set(), write=lambda step, kind, values: rows.update({step: values})
    ),
    lambda state: Signal(**absent | measured),
    every_steps=every_steps,
    total_steps=10,
    steps_per_epoch=5,
  )
  for step in range(11):
    log.write_if_due(step, None)
  assert [*rows] == written
  assert [step + log.steps_to_next(step) for step in [0, *stops[:-1]]] == stops
  for row in rows.values():
    assert row["branch_to_skip"][:2] == [0.33333, math.inf]
    assert math.isnan(row["branch_to_skip"][2])
    assert row["gradient_rms"] == [1.2346e-12, 0, 123460]
