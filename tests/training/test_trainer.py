"""A run on its devices: which examples it sees, when it stops, and on how many."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skipinit_jax.data.datasets import Dataset, Split
from skipinit_jax.training import (
  EpochMetrics,
  TrainConfig,
  TrainState,
  batch_sharding,
  make_mesh,
  make_train_steps,
  state_sharding,
)
from skipinit_jax.training import batches as batches_lib
from skipinit_jax.training import trainer as trainer_lib
from tests.training.runs import (
  assert_same_training,
  bits,
  dispatch,
  largest_change,
  make_trainer,
)

# Three batches of 32 an epoch, and four examples that each epoch leaves out.
NUM_EXAMPLES, BATCH_SIZE, STEPS_PER_EPOCH = 100, 32, 3

MLP = TrainConfig(
  model="residual_mlp",
  depth=4,
  width=16,
  batch_size=BATCH_SIZE,
  learning_rate=0.05,
  schedule="exponential",
  growth_per_epoch=0.8,
)


@pytest.mark.parametrize(
  "config",
  [
    dataclasses.replace(MLP, method="batch_norm", ghost_batch_size=8),
    dataclasses.replace(
      MLP,
      method="batch_norm",
      dropout_rate=0.3,
      crop_padding=1,
      flip=True,
      accumulation_steps=2,
      drop_path=0.5,
      label_smoothing=0.1,
      mixup=0.4,
      ema_decay=0.9,
    ),
  ],
  ids=["ghost", "augmented_accumulated"],
)
def test_any_number_of_devices(config):
  one = make_trainer(config, 1, NUM_EXAMPLES)
  expected = dispatch(one, 3, 2)
  # What follows would hold for a step that does nothing.
  assert largest_change(expected.params, one.initial_state.params) > 1e-2
  assert int(expected.step) == 5
  assert expected.sums.steps == 2
  # A ghost batch on two devices is part of one's examples, on eight it spans some.
  for num_devices in (2, 8) if config.ghost_batch_size else (8,):
    many = make_trainer(config, num_devices, NUM_EXAMPLES)
    assert bits(many.initial_state) == bits(one.initial_state)
    for leaf in jax.tree.leaves(many.initial_state):
      assert len(leaf.addressable_shards) == num_devices and leaf.is_fully_replicated
    assert_same_training(dispatch(many, 3, 2), expected)


def test_accumulation_is_the_whole_batch():
  whole = dataclasses.replace(MLP, method="batch_norm", ghost_batch_size=8)
  expected = dispatch(make_trainer(whole, 1, NUM_EXAMPLES), 3, 1)
  # Normalization sees one part of 8 at a time: a part is a ghost batch.
  for ghost_batch_size in (8, None):
    config = dataclasses.replace(
      whole, ghost_batch_size=ghost_batch_size, accumulation_steps=4
    )
    actual = dispatch(make_trainer(config, 2, NUM_EXAMPLES), 3, 1)
    # Each part has running statistics of its own.
    assert_same_training(actual.replace(model_state=expected.model_state), expected)


def test_cut_into_any_dispatches():
  config = dataclasses.replace(
    MLP, method="batch_norm", dropout_rate=0.3, crop_padding=1
  )
  trainer = make_trainer(config, 1, NUM_EXAMPLES)
  whole = dispatch(trainer, 3, 3, 2)
  assert bits(dispatch(trainer, 1, 1, 1, 2, 1, 1, 1)) == bits(whole)


def test_seeds_and_rates_are_arguments_of_one_program(monkeypatch):
  texts = []
  make_init = trainer_lib.make_init

  def record(*args, **kwargs):
    init, sharding = make_init(*args, **kwargs)
    texts.append(init.lower(np.uint32(0), np.float32(0)).as_text())
    return init, sharding

  monkeypatch.setattr(trainer_lib, "make_init", record)
  states = []
  for seed, rate in ((0, 0.5), (0, 2**-9), (2**32 - 1, 0.5)):
    config = dataclasses.replace(MLP, seed=seed, learning_rate=rate)
    state = make_trainer(config, 1, NUM_EXAMPLES).initial_state
    assert optax.tree.get(state.opt_state, "learning_rate") == np.float32(rate)
    states.append(state)
    # Nothing is drawn from the key that the run's keys are made of, either.
    keys = [jax.random.key_data(key).tobytes() for key in state.random_keys()]
    assert len({*keys, state.key_data.tobytes()}) == 4
  assert texts[0] == texts[1] == texts[2]
  first, same, other = states
  assert bits(first.params) == bits(same.params)
  assert bits(first.params["stem"]) != bits(other.params["stem"])
  assert bits(first.key_data) != bits(other.key_data)


@functools.cache
def recorder(num_devices=1):
  """Returns functions: a new state, and dispatches of a step that records.

  The step notes the images and labels that it is given, and adds a value of the state,
  that of its field `opt_state`, to a sum or a parameter when it is the fifth. An image
  has two pixels, n and n + 128, where n is its number.
  """
  mesh = make_mesh(jax.devices()[:num_devices])
  numbers = np.arange(NUM_EXAMPLES)
  images = np.stack([numbers, numbers + 128], axis=-1).astype(np.uint8)
  split = Split(images.reshape(-1, 1, 2, 1), 1000 + numbers.astype(np.int32))
  dataset = Dataset("numbers", 10, split, split)
  config = TrainConfig(batch_size=BATCH_SIZE, flip=True)
  source = batches_lib.make_batch_source(config, dataset, mesh)

  def new_state(**fifth):
    return TrainState(
      step=jnp.int32(0),
      params={"weight": jnp.zeros(())},
      model_state={
        "pixels": jnp.full((9, BATCH_SIZE), -1),
        "labels": jnp.full((9, BATCH_SIZE), -1),
      },
      opt_state={
        what: jnp.float32(fifth.get(what, 0))
        for what in ("loss", "grad_norm", "weight")
      },
      key_data=jax.random.key_data(jax.random.key(7)),
      sums=EpochMetrics.zero(),
    )

  def step(state, inputs, labels):
    pixels = (inputs * dataset.std + dataset.mean)[:, 0, 0, 0] * 255
    record = state.model_state
    record = {
      "pixels": record["pixels"].at[state.step].set(jnp.round(pixels).astype(int)),
      "labels": record["labels"].at[state.step].set(labels),
    }
    fifth = jax.tree.map(lambda x: jnp.where(state.step == 4, x, 0), state.opt_state)
    sums = state.sums
    return state.replace(
      step=state.step + 1,
      params={"weight": fifth["weight"]},
      model_state=record,
      sums=sums.replace(
        steps=sums.steps + 1,
        # The loss of step n is 10^n.
        loss=sums.loss + 10.0**state.step + fifth["loss"],
        grad_norm=sums.grad_norm + fifth["grad_norm"],
      ),
    )

  train_steps = make_train_steps(
    step,
    source.batches,
    steps_per_epoch=STEPS_PER_EPOCH,
    mesh=mesh,
    sharding=state_sharding(new_state(), mesh, shard_params=False),
  )
  data = source.data_shapes()
  return new_state, lambda state, num_steps: train_steps(state, data, num_steps)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_every_example_once_an_epoch(num_devices):
  new_state, train_steps = recorder(num_devices)
  state = new_state()
  for num_steps in (3, 1, 2, 1, 1, 1):
    state, finite = train_steps(state, num_steps)
    assert finite
  pixels = np.asarray(state.model_state["pixels"])
  images, flipped = pixels % 128, pixels >= 128
  np.testing.assert_array_equal(state.model_state["labels"], images + 1000)
  epochs = images.reshape(3, -1)
  for epoch in epochs:
    assert len({*epoch.tolist()}) == 3 * BATCH_SIZE
    assert {*epoch.tolist()} <= {*range(NUM_EXAMPLES)}
    # Shuffled: in order, all but the last step would be 1.
    assert np.mean(np.diff(epoch) == 1) < 0.1
  # Epochs differ in order, and in the four that they leave out.
  assert len({epoch.tobytes() for epoch in epochs}) == 3
  assert len({frozenset(epoch.tolist()) for epoch in epochs}) == 3
  # Each step augments in its own way.
  assert len({row.tobytes() for row in flipped}) == 9
  assert 0.3 < flipped.mean() < 0.7


def test_sums_start_again_with_each_epoch():
  new_state, train_steps = recorder()
  state = new_state()
  seen = []
  for num_steps in (1, 2, 1, 1, 1, 3):
    state, _ = train_steps(state, num_steps)
    seen.append((int(state.sums.steps), float(state.sums.loss)))
  # At the end of an epoch they are still there, to be reported.
  assert seen == [
    (1, 1e0),
    (3, 111e0),
    (1, 1e3),
    (2, 11e3),
    (3, 111e3),
    (3, pytest.approx(111e6)),
  ]
  assert state.sums.means()["loss"] == pytest.approx(111e6 / 3)


@pytest.mark.parametrize(
  ("what", "value"), [("loss", math.nan), ("loss", math.inf), ("weight", -math.inf)]
)
def test_stops_after_the_first_step_that_is_not_finite(what, value):
  new_state, train_steps = recorder()
  state, finite = train_steps(new_state(**{what: value}), 3)
  assert finite
  state, finite = train_steps(state, 3)
  assert not finite
  assert int(state.step) == 5
  # The sixth step was not taken, and no later dispatch takes it.
  assert (np.asarray(state.model_state["pixels"][5]) == -1).all()
  state, finite = train_steps(state, 1)
  assert not finite
  assert int(state.step) == 5


def test_a_large_finite_weight_is_finite():
  # Its square is not, in float32.
  new_state, train_steps = recorder()
  state, _ = train_steps(new_state(weight=1e30), 3)
  assert train_steps(state, 3)[1]


def test_a_batch_lies_on_all_devices_in_their_order():
  rows = np.arange(16).reshape(8, 2)
  array = jax.device_put(rows, batch_sharding(make_mesh()))
  shards = sorted(array.addressable_shards, key=lambda shard: shard.device.id)
  assert [shard.data.tolist() for shard in shards] == rows[:, None].tolist()
