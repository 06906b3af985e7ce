"""Mixed precision, rematerialization and accumulation: what a large batch needs."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from skipinit_jax.compilation import compiler_options
from skipinit_jax.training import TrainConfig, batch_sharding
from tests.training.runs import assert_close, make_step

MLP = TrainConfig(
  model="residual_mlp", depth=3, width=16, batch_size=64, learning_rate=0.05
)
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
SHAPE = (4, 4, 1)


def batches(config, number):
  """Returns batches of noise, on which a label leaves a mark to be learned."""
  rng = np.random.default_rng(0)
  labels = rng.integers(10, size=(number, config.batch_size))
  images = rng.normal(size=(*labels.shape, *SHAPE))
  images[..., 0, :, 0] += labels[..., None] / 5
  return images.astype(np.float32), labels.astype(np.int32)


class Step:
  """A configuration's compiled step on one device, and its first state."""

  def __init__(self, config):
    self.images, self.labels = batches(config, 8)
    self.step, self.start, sharding = make_step(config, image_shape=SHAPE)
    batch = batch_sharding(sharding.step.mesh)
    jitted = jax.jit(
      self.step,
      in_shardings=(sharding, batch, batch),
      compiler_options=compiler_options(),
    )
    self.compiled = jitted.lower(self.start, self.images[0], self.labels[0]).compile()

  @property
  def temporary_bytes(self):
    return self.compiled.memory_analysis().temp_size_in_bytes

  def run(self, num_steps):
    """Returns the state after some steps, and their losses."""
    state, losses = self.start, []
    for index in range(num_steps):
      before = float(state.sums.loss)
      images, labels = self.images[index % 8], self.labels[index % 8]
      state = self.compiled(
        state,
        *jax.device_put((images, labels), self.compiled.input_shardings[0][1]),
      )
      losses.append(float(state.sums.loss) - before)
    return state, losses


def float_dtypes(tree):
  return {
    leaf.dtype
    for leaf in jax.tree.leaves(tree)
    if jnp.issubdtype(leaf.dtype, jnp.floating)
  }


def products(jaxpr):
  """Counts a program's matrix products and convolutions by their operands' dtypes."""
  counts = collections.Counter()
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
      counts[tuple(variable.aval.dtype for variable in equation.invars)] += 1
    for inner in jaxprs_in_params(equation.params):
      counts += products(getattr(inner, "jaxpr", inner))
  return counts


def test_bfloat16_computes_on_a_float32_state():
  config = dataclasses.replace(
    MLP, method="batch_norm", ghost_batch_size=16, accumulation_steps=2
  )
  half = Step(dataclasses.replace(config, dtype="bfloat16"))
  state, losses = half.run(16)
  assert float_dtypes(state) == {FLOAT32}
  # Training is close to that in float32, and is not that.
  _, expected = Step(config).run(16)
  assert expected[-1] < 0.97 * expected[0]
  np.testing.assert_allclose(losses, expected, rtol=0.02)
  assert losses != expected


@pytest.mark.parametrize(
  "fields",
  [
    {"method": "batch_norm", "adaptive_clip": 0.1},
    {"method": "skipinit", "model": "wide_resnet", "depth": 10, "width": 1},
  ],
  ids=["batch_norm", "wide_resnet"],
)
def test_only_the_classifier_is_in_float32(fields):
  config = dataclasses.replace(MLP, **fields, dtype="bfloat16")
  step, state, _ = make_step(config, image_shape=SHAPE, shapes=True)
  images, labels = batches(config, 1)
  counts = products(jax.make_jaxpr(step)(state, images[0], labels[0]).jaxpr)
  assert counts.keys() == {(BFLOAT16, BFLOAT16), (FLOAT32, FLOAT32)}
  # Forward, and for both gradients.
  assert counts[FLOAT32, FLOAT32] == 3 < counts[BFLOAT16, BFLOAT16]


def test_remat_is_the_same_step_in_less_memory():
  config = dataclasses.replace(
    MLP,
    method="batch_norm",
    depth=16,
    layers_per_block=3,
    batch_size=256,
    dropout_rate=0.3,
  )
  expected = Step(config)
  remat = Step(dataclasses.replace(config, remat=True))
  for num_steps in (1, 3):
    assert_close(remat.run(num_steps)[0], expected.run(num_steps)[0])
  assert remat.temporary_bytes < 0.7 * expected.temporary_bytes


def test_accumulation_takes_less_memory():
  config = dataclasses.replace(
    MLP, method="batch_norm", ghost_batch_size=32, batch_size=4096
  )
  parts = dataclasses.replace(config, accumulation_steps=16)
  # A part's activations are a 16th.
  assert Step(parts).temporary_bytes < Step(config).temporary_bytes / 4
