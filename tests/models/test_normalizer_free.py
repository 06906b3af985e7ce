"""Networks without normalization, against what their papers define them by."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.layers import WeightStandardizedConv, scaled_relu
from skipinit_jax.models import (
  BasicBlock,
  DepthStack,
  FullyConnectedBlock,
  ResidualBlock,
  ResidualMLP,
  ResNet,
  WideResNet,
)
from tests.models.common import random_variables

NF_RESNET = methods.get("nf_resnet")
IMAGES = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def standardized(kernel):
  rows = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
  return (rows - rows.mean(0)) / (rows.std(0) * len(rows) ** 0.5)


def test_output_of_nf_resnet():
  """x + 0.2 alpha f(x / beta), written out."""
  x = IMAGES.reshape(4, -1)
  model = ResidualMLP(3, 6, 5, NF_RESNET, layers_per_block=2)
  variables = random_variables(model, IMAGES, train=False)
  params = variables["params"]

  def layer(x, params):
    return x @ (standardized(params["kernel"]) * params["scale"]) + params.get(
      "bias", 0
    )

  def activate(x):
    return np.maximum(x, 0) * (2 / (1 - 1 / np.pi)) ** 0.5

  x = layer(x, params["stem"])
  for index in range(3):
    block = jax.tree.map(lambda leaf, i=index: leaf[i], params["stack"]["blocks"])
    y = layer(activate(x / (1 + 0.04 * index) ** 0.5), block["dense1"])
    x = x + 0.2 * block["branch_scale"]["alpha"] * layer(activate(y), block["dense2"])
  # The classifier's weights are as they are.
  classifier = params["head"]["classifier"]
  expected = activate(x) @ classifier["kernel"] + classifier["bias"]
  logits = jax.jit(functools.partial(model.apply, train=False))(variables, IMAGES)
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("model", "stage_blocks"),
  [
    (WideResNet(28, 2, 5, NF_RESNET, scan=False), (4, 4, 4)),
    (WideResNet(10, 1, 5, NF_RESNET, scan=False), (1, 1, 1)),
    (ResNet(50, 5, NF_RESNET, scan=False), (3, 4, 6, 3)),
  ],
)
def test_what_blocks_divide_by(model, stage_blocks):
  """The published recursion: sigma' = sqrt(sigma^2 + alpha^2), from one at a stage."""
  seen = []

  def record(run, args, keywords, context):
    if isinstance(context.module, ResidualBlock) and context.method_name == "__call__":
      seen.append(float(args[1]))
    return run(*args, **keywords)

  with nn.intercept_methods(record):
    jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))
  std, expected = 1.0, []
  for blocks in stage_blocks:
    for block in range(blocks):
      expected.append(std)
      std = ((1.0 if block == 0 else std**2) + 0.2**2) ** 0.5
  np.testing.assert_allclose(seen, expected)


class Circular(nn.Module):
  """Two stages of blocks with their layers on a circle, where no border is special."""

  @nn.compact
  def __call__(self, x):
    fields = {
      "conv": functools.partial(WeightStandardizedConv, padding="CIRCULAR"),
      "activation": scaled_relu,
      "branch_scale": lambda name: lambda y: 0.2 * y,
    }
    stds = np.sqrt(NF_RESNET.expected_variances([False, False, True, False, False]))
    block = functools.partial(BasicBlock, 48, **fields)
    x = DepthStack(block, 2, name="first")(x, stds[:2])
    x = block(strides=2, name="transition")(x, stds[2])
    return DepthStack(block, 2, name="second")(x, stds[3:])


def test_the_variance_at_each_block_is_the_expected_one():
  def moments(key):
    key, x_key = jax.random.split(key)
    x = jax.random.normal(x_key, (8, 8, 8, 48))
    _, state = Circular().init_with_output(
      key, x, mutable=True, capture_intermediates=True
    )
    outputs = state["intermediates"]
    first, second = (
      outputs[name]["blocks"]["__call__"][0] for name in ("first", "second")
    )
    transition = outputs["transition"]["__call__"][0]
    features = [*first, transition, *second]
    return jnp.array(
      [(y.var((0, 1, 2)).mean(), jnp.square(y).mean()) for y in features]
    )

  keys = jax.random.split(jax.random.key(0, impl="rbg"), 32)
  values = jax.jit(functools.partial(jax.lax.map, moments))(keys)
  variance, second_moment = values.mean(0).T
  expected = [1.04, 1.08, 1.04, 1.08, 1.12]
  np.testing.assert_allclose(variance, expected, rtol=0.017)
  # All of the second moment is variance: the means of channels do not shift.
  np.testing.assert_allclose(second_moment, variance, rtol=0.014)


def test_division_keeps_the_features_dtype():
  seen = set()

  def activation(x):
    seen.add(x.dtype)
    return x

  x = jnp.ones((2, 6), jnp.bfloat16)
  block = functools.partial(
    FullyConnectedBlock, 6, activation=activation, dtype=jnp.bfloat16
  )
  stack = DepthStack(block, 2)
  for module, std in ((block(), 1.5), (block(), jnp.float32(1.5)), (stack, np.ones(2))):
    jax.eval_shape(module.init, jax.random.key(0), x, std)
  assert seen == {jnp.dtype("bfloat16")}


def test_dynamical_isometry():
  """All singular values of the Jacobian are one at ReZero's initialization.

  Bachlechner et al. (UAI 2021), section 3.
  """
  method = methods.get("rezero")
  scale = functools.partial(method.branch_scale, method.alpha)
  stack = DepthStack(functools.partial(FullyConnectedBlock, 16, branch_scale=scale), 32)
  x = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
  variables = stack.init(jax.random.key(0), x)
  jacobian = jax.jacobian(lambda x: stack.apply(variables, x[None])[0])(x[0])
  values = np.linalg.svd(jacobian, compute_uv=False)
  np.testing.assert_allclose(values, 1, rtol=1e-6)
