"""What tests of runs and of their steps share: digits, trainers and comparisons."""

import dataclasses
import functools

import jax
import numpy as np

from skipinit_jax import data
from skipinit_jax.data import augmentation
from skipinit_jax.data.datasets import Split
from skipinit_jax.training import (
  Checkpoints,
  Trainer,
  loop,
  make_init,
  make_mesh,
  make_optimizer,
  make_train_step,
)
from skipinit_jax.training.metrics import read_metrics


class StopAt:
  """Requests a stop the n-th time that it is asked; stands in for `StopRequest`."""

  def __init__(self, asked):
    self._left = asked

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    pass

  @property
  def requested(self):
    self._left -= 1
    return self._left < 0


def train(config, workdir, num_devices=2, stop=None):
  """Trains on the first devices."""
  devices = jax.devices()[:num_devices]
  return loop.train(config, workdir, show_progress=False, devices=devices, stop=stop)


def rows_of(workdir, *kinds):
  """Returns the rows of a run, of some kinds or all, without what no two runs share."""
  return [
    {name: value for name, value in row.items() if name != "images_per_second"}
    for row in read_metrics(workdir)
    if not kinds or row["kind"] in kinds
  ]


@functools.cache
def digits(num_examples=1472):
  """The digits, of which the first are the training set."""
  dataset = data.load("digits")
  train = dataset.train
  return dataclasses.replace(
    dataset, train=Split(train.images[:num_examples], train.labels[:num_examples])
  )


def preprocess(images):
  return np.asarray(augmentation.normalize(images, digits().mean, digits().std))


def make_trainer(config, num_devices=1, num_examples=1472):
  """Returns a configuration's trainer on the first devices and some of the digits."""
  config.validate(num_devices)
  mesh = make_mesh(jax.devices()[:num_devices])
  return Trainer(config, digits(num_examples), config.make_model(10), mesh)


def make_step(
  config,
  num_devices=1,
  image_shape=(8, 8, 1),
  steps_per_epoch=23,
  shapes=False,
  weights=None,
  num_classes=10,
):
  """Returns a configuration's step, to be compiled, and the state that it begins with.

  The state's sharding comes third. `shapes` leaves the state at its shapes.
  """
  mesh = make_mesh(jax.devices()[:num_devices])
  model = config.make_model(num_classes)
  optimizer = functools.partial(make_optimizer, config, steps_per_epoch)
  init, sharding = make_init(
    model, optimizer, image_shape, mesh=mesh, shard_params=config.shard_params
  )
  step = make_train_step(
    model,
    optimizer(),
    mesh=mesh,
    sharding=sharding,
    accumulation_steps=config.accumulation_steps,
    label_smoothing=config.label_smoothing,
    mixup=config.mixup,
  )
  seed, rate = np.uint32(config.seed), np.float32(config.learning_rate)
  state = jax.eval_shape(init, seed, rate) if shapes else init(seed, rate, weights)
  return step, state, sharding


def dispatch(trainer, *dispatches):
  """Returns the state after dispatches of so many steps each, from the start."""
  state = jax.tree.map(lambda x: x.copy(), trainer.initial_state)
  for num_steps in dispatches:
    state, finite = trainer.train_steps(state, num_steps)
    assert finite
  return state


def bits(tree):
  """Returns what is equal for trees that are the same to the bit."""
  leaves = map(np.asarray, jax.tree.leaves(tree))
  values = [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves]
  return jax.tree.structure(tree), values


def saved_state(workdir, config):
  """Returns the step and the state of a run's newest checkpoint."""
  _, template, _ = make_step(config, shapes=True)
  with Checkpoints(workdir, config=config.identity()) as checkpoints:
    return jax.device_get(checkpoints.restore_latest(template))


def largest_change(after, before):
  changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, before)
  return max(jax.tree.leaves(jax.device_get(changes)))


def assert_close(actual, expected, *, rtol=1e-4, atol=1e-5):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, a), b in zip(
    jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(
      a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path)
    )


def assert_same_training(state, expected):
  """Asserts that two states differ by rounding only."""
  assert_close(state.params, expected.params)
  assert_close(state.model_state, expected.model_state)
  assert_close(state.opt_state, expected.opt_state, atol=1e-4)
  assert_close(state.sums, expected.sums)
