"""NNX's blocks and layers, against their Linen twins on the same variables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from skipinit_jax import layers, methods
from skipinit_jax import nnx as native
from skipinit_jax.errors import UsageError
from tests.nnx.common import check_same

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.normal(1, 2, (4, 4, 5, 8)).astype(np.float32)
TOKENS = GENERATOR.normal(1, 2, (4, 5, 8)).astype(np.float32)
ROWS = GENERATOR.normal(1, 2, (4, 8)).astype(np.float32)
ARGUMENTS = {
  "num_blocks": 3,
  "train": True,
  "dtype": jnp.float32,
  "param_dtype": jnp.float32,
}


def activated(name, branch_layers):
  return methods.get(name).activated_block_fields(
    branch_layers=branch_layers, **ARGUMENTS
  )


# One of each kind of layer. Networks of every method, and of the other blocks of
# convolutions, are tested in test_networks.py.
METHODS = pytest.mark.parametrize(
  "name", ["batch_norm", "layer_scale", "fixup", "nf_resnet", "skipinit_biases"]
)


@METHODS
@pytest.mark.parametrize(
  ("block", "branch_layers", "features"),
  [(native.BottleneckBlock, 3, 2), (native.PostActivationBasicBlock, 2, 8)],
)
def test_blocks_of_convolutions(block, branch_layers, features, name):
  fields = {
    # Some project the shortcut.
    "strides": 2 if name in ("fixup", "batch_norm") else 1,
    "conv": methods.get(name).conv,
    **activated(name, branch_layers),
  }
  check_same(
    functools.partial(block, 8, 8, **fields), block.twin(features, **fields), IMAGES
  )


@METHODS
def test_blocks_of_dense_layers(name):
  method = methods.get(name)
  fields = activated(name, 2) | {"num_layers": 2, "dense": method.dense}
  block = functools.partial(native.FullyConnectedBlock, 8, **fields)
  check_same(block, native.FullyConnectedBlock.twin(8, **fields), ROWS)
  if method.scalar_biases or method.divide_by_expected_std:
    return
  fields = method.block_fields(**ARGUMENTS)
  heads = {"num_heads": 2}
  block = functools.partial(native.AttentionBlock, 8, **heads, **fields)
  check_same(block, native.AttentionBlock.twin(8, **heads, **fields), TOKENS)
  block = functools.partial(native.MLPBlock, 8, **fields)
  check_same(block, native.MLPBlock.twin(8, **fields), TOKENS)


@pytest.mark.parametrize("train", [True, False])
def test_ghost_batches(train):
  fields = {"ghost_batch_size": 2, "momentum": 0.8, "use_running_average": not train}
  check_same(
    functools.partial(native.GhostBatchNorm, 8, **fields),
    layers.GhostBatchNorm(**fields),
    IMAGES,
  )


def test_fixed_scales_and_initial_values():
  fixed = [native.SkipInit(0.5, learnable=False), native.SkipInit(0.5)]
  assert [len(jax.tree.leaves(nnx.state(each, nnx.Param))) for each in fixed] == [0, 1]
  for each in [*fixed, native.LayerScale(8, 0.5), native.LayerScale(8, 0.5)]:
    np.testing.assert_array_equal(each(jnp.bfloat16(ROWS)), jnp.bfloat16(ROWS) / 2)
  assert native.SkipInit()(ROWS).any() == native.ScalarBias().bias[...] == 0


def test_blocks_take_modules_of_nnx_and_of_a_user():
  class Halve(nnx.Module):
    def __init__(self, num_features, *, rngs):
      self.num_features = num_features

    def __call__(self, x):
      return x / 2

  block = native.MLPBlock(8, normalizer=Halve, rngs=nnx.Rngs(0))
  plain = native.MLPBlock(8, rngs=nnx.Rngs(0))
  assert block.norm1.num_features == 8
  # Without biases, the branch is homogeneous.
  np.testing.assert_allclose(
    2 * (block(TOKENS) - TOKENS), plain(TOKENS) - TOKENS, rtol=1e-4, atol=1e-5
  )
  # Positional arguments of a Linen module are not those of its twin.
  for normalizer in (
    functools.partial(nnx.GroupNorm, num_groups=2),
    functools.partial(nn.GroupNorm, 2),
  ):
    fields = {"normalizer": normalizer, "branch_scale": native.LayerScale}
    block = functools.partial(native.MLPBlock, 8, **fields)
    fields = {"normalizer": functools.partial(nn.GroupNorm, 2)}
    check_same(
      block, block.func.twin(8, branch_scale=layers.LayerScale, **fields), TOKENS
    )


def test_weights_are_scaled_instead_of_activations():
  block = native.BasicBlock(8, 8, branch_scale=native.SkipInit, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(block)
  program = str(jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, IMAGES))
  # Only the sum of shortcut and branch multiplies activations, by one.
  assert program.count("f32[4,4,5,8] = mul") == 1


class OfAUser(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"normalizer": nn.LayerNorm()},
      r"normalizer is a module, LayerNorm\(\.\.\.\): it ",
    ),
    ({"normalizer": OfAUser}, "normalizer is OfAUser, a Linen module .* nnx.LayerNorm"),
    ({"normalizer": functools.partial(OfAUser)}, "normalizer is OfAUser, a Linen "),
    ({"branch_scale": native.SkipInit()}, "branch_scale is a module, SkipInit"),
    ({"branch_scale": 0.0}, r"branch_scale is 0.0: .* skipinit_jax.nnx.SkipInit"),
    ({"conv": 3}, r"conv is 3: .* called as conv\(in_features, out_features, k"),
    ({"out_features": 6}, "out_features is 6: .* a positive multiple of 4"),
  ],
)
def test_what_a_block_cannot_be_made_of(fields, message):
  with pytest.raises(UsageError, match=message):
    native.BottleneckBlock(**{"in_features": 8, "out_features": 8} | fields, rngs=None)


def test_other_inputs():
  block = native.FullyConnectedBlock(8, rngs=nnx.Rngs(0))
  with pytest.raises(UsageError, match=r"FullyConnectedBlock has 8 features, but .* 3"):
    block(ROWS[:, :3])
  with pytest.raises(UsageError, match=r"num_heads is 3: it must divide .* 8"):
    native.AttentionBlock(8, num_heads=3, rngs=nnx.Rngs(0))
