"""What tests of runs and of their steps share: digits, dispatches and comparisons."""

import functools

import jax
import numpy as np

from skipinit_jax import data
from skipinit_jax.data import augmentation, in_memory
from skipinit_jax.training import (
  make_init,
  make_mesh,
  make_optimizer,
  make_train_step,
  make_train_steps,
  replicated,
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


def rows_of(workdir):
  """Returns the rows of a run without what no two runs share."""
  return [
    {name: value for name, value in row.items() if name != "images_per_second"}
    for row in read_metrics(workdir)
  ]


@functools.cache
def digits():
  return data.load("digits")


def preprocess(images):
  return augmentation.normalize(images, digits().mean, digits().std)


class Trainer:
  """A configuration's initialization, step and dispatch on the first devices.

  An epoch is `num_examples` of the digits, those of an incomplete batch left out.
  """

  def __init__(
    self,
    config,
    num_devices,
    *,
    num_examples,
    augment=lambda key, images: preprocess(images),
  ):
    config.validate(num_devices)
    self.mesh = make_mesh(jax.devices()[:num_devices])
    self.model = config.make_model(10)
    optimizer = make_optimizer(config, num_examples // config.batch_size)
    self.init = make_init(
      self.model,
      optimizer,
      (8, 8, 1),
      mesh=self.mesh,
      shard_params=config.shard_params,
    )
    sharding = (
      jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
      if config.shard_params
      else None
    )
    self.step = make_train_step(
      self.model,
      optimizer,
      mesh=self.mesh,
      accumulation_steps=config.accumulation_steps,
      sharding=sharding,
    )
    self.train_steps = make_train_steps(
      self.step,
      augment,
      num_examples=num_examples,
      batch_size=config.batch_size,
      mesh=self.mesh,
      sharding=sharding,
    )
    self.split = in_memory.put(digits().train, replicated(self.mesh))

  @functools.cached_property
  def shapes(self):
    """Shapes and shardings of the state."""
    return self.init.trace(np.uint32(0)).out_info

  def dispatch(self, state, *dispatches):
    """Returns the state after dispatches of so many steps each."""
    for num_steps in dispatches:
      state, finite = self.train_steps(state, self.split, num_steps)
      assert finite
    return state


def bits(tree):
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


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
