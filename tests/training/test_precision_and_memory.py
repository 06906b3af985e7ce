"""Mixed precision, rematerialization and accumulation: what a large batch needs."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from skipinit_jax.training import TrainConfig, batch_sharding
from skipinit_jax.training.compilation import compiler_options
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
  """A configuration's compiled step on the first devices, and its first state."""

  def __init__(self, config, num_devices=1):
    config.validate(num_devices)
    self.images, self.labels = batches(config, 8)
    self.step, self.start, sharding = make_step(config, num_devices, SHAPE)
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


@pytest.mark.parametrize(
  "fields",
  [
    {"method": "batch_norm", "adaptive_clip": 0.1},
    {"method": "batch_norm", "ghost_batch_size": 16, "accumulation_steps": 2},
    {"method": "skipinit", "model": "wide_resnet", "depth": 10, "width": 1},
  ],
  ids=["batch_norm", "ghost", "wide_resnet"],
)
def test_bfloat16_computes_on_a_float32_state(fields):
  config = dataclasses.replace(MLP, **fields)
  half = Step(dataclasses.replace(config, dtype="bfloat16"))
  state, losses = half.run(16)
  assert float_dtypes(state) == {FLOAT32}
  # Only the classifier, forward and for both gradients, is in float32.
  jaxpr = jax.make_jaxpr(half.step)(half.start, half.images[0], half.labels[0])
  counts = products(jaxpr.jaxpr)
  assert counts.keys() == {(BFLOAT16, BFLOAT16), (FLOAT32, FLOAT32)}
  assert counts[FLOAT32, FLOAT32] == 3 < counts[BFLOAT16, BFLOAT16]
  # Training is close to that in float32, and is not that.
  _, expected = Step(config).run(16)
  assert expected[-1] < 0.97 * expected[0]
  np.testing.assert_allclose(losses, expected, rtol=0.02)
  assert losses != expected


@pytest.mark.parametrize("ghost_batch_size", [None, 64])
def test_statistics_of_bfloat16_features_are_float32(ghost_batch_size):
  config = dataclasses.replace(
    MLP,
    method="batch_norm",
    dtype="bfloat16",
    ghost_batch_size=ghost_batch_size,
    batch_size=512,
  )
  step = Step(config)
  # What the first normalizer sees; without the offset a mean of few bits would do.
  kernel = step.start.params["stem"]["kernel"]
  step.images += 3
  images = jnp.asarray(step.images[0].reshape(512, -1), BFLOAT16)
  features = jnp.dot(images, kernel.astype(BFLOAT16))
  assert features.dtype == BFLOAT16
  features = np.asarray(features, np.float64).reshape(-1, ghost_batch_size or 512, 16)
  state, _ = step.run(1)
  running = state.model_state["batch_stats"]["stack"]["blocks"]["norm1"]
  mean, var = 0.1 * features.mean(1).mean(0), 0.9 + 0.1 * features.var(1).mean(0)
  # A bfloat16 has an error of up to 2^-9.
  np.testing.assert_allclose(running["mean"][0], mean, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(running["var"][0], var, rtol=1e-5)


@pytest.mark.parametrize("method", ["batch_norm", "skipinit"])
def test_remat_is_the_same_step_in_less_memory(method):
  config = dataclasses.replace(
    MLP, method=method, depth=16, layers_per_block=3, batch_size=256, dropout_rate=0.3
  )
  expected = Step(config)
  remat = Step(dataclasses.replace(config, remat=True))
  for num_steps in (1, 3):
    assert_close(remat.run(num_steps)[0], expected.run(num_steps)[0])
  assert remat.temporary_bytes < 0.7 * expected.temporary_bytes


@pytest.mark.parametrize(
  "fields",
  [{"method": "skipinit"}, {"method": "batch_norm", "ghost_batch_size": 32}],
  ids=["skipinit", "ghost"],
)
def test_4096_examples_on_one_device_are_those_on_eight(fields):
  config = dataclasses.replace(MLP, **fields, batch_size=4096)
  eight = Step(config, num_devices=8)
  one = Step(dataclasses.replace(config, accumulation_steps=16))
  (state, losses), (expected, expected_losses) = one.run(8), eight.run(8)
  assert expected_losses[-1] < 0.97 * expected_losses[0]
  np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
  assert_close(state.params, expected.params)
  assert_close(state.opt_state, expected.opt_state, atol=1e-4)
  assert_close(state.sums, expected.sums)
  # One device alone needs accumulation: a part's activations are a 16th.
  assert one.temporary_bytes < Step(config).temporary_bytes / 4
