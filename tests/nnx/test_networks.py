"""NNX's networks and stacks, against their Linen twins; conversion of variables."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skipinit_jax import methods, models
from skipinit_jax import nnx as native
from skipinit_jax.errors import UsageError
from skipinit_jax.models.depth import Stages
from tests.nnx.common import check_same

IMAGES = np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype(np.float32)


def shapes(tree):
  return jax.tree.map(lambda leaf: leaf.shape, dict(tree))


# Networks of version 2 and 1.
@pytest.mark.parametrize("name", ["batch_norm", "fixup"])
def test_whole_networks_have_the_variables_of_their_twins(name):
  method = methods.get(name)
  init = functools.partial(models.ResNet(50, 5, method).init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), IMAGES)
  model = nnx.eval_shape(lambda: native.ResNet(50, 5, method, rngs=nnx.Rngs(0)))
  assert shapes(native.to_linen(model)) == shapes(variables)


@pytest.fixture
def small(monkeypatch):
  """Networks of two small blocks, so that little is compiled."""
  for network in (models.ResNet, models.WideResNet):
    stages = network.stages
    monkeypatch.setattr(
      network,
      "stages",
      lambda self, stages=stages: Stages(*stages(self)[:2], [3], [2], [2]),
    )


@pytest.mark.parametrize("name", methods.NAMES)
def test_networks_of_every_method_compute_what_their_twins_do(name, small):
  # Dropout draws other masks.
  method = dataclasses.replace(methods.get(name), dropout_rate=0.0)
  fields = {"depth": 16, "width": 1, "num_classes": 5, "method": method, "scan": False}
  make = functools.partial(native.WideResNet, **fields)
  check_same(make, models.WideResNet(**fields), IMAGES, train=True)


@pytest.mark.parametrize(
  ("name", "depth", "fields"),
  [
    (
      "batch_norm",
      50,
      {"version": 1, "symmetric_padding": True, "average_projection": True},
    ),
    ("batch_norm", 18, {"symmetric_stem": True}),
    ("fixup", 50, {}),
  ],
)
def test_resnets_compute_what_their_twins_do(name, depth, fields, small):
  fields = fields | {"scan": False}
  arguments = (depth, 5, methods.get(name))
  make = functools.partial(native.ResNet, *arguments, **fields)
  images = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
  check_same(make, models.ResNet(*arguments, **fields), images, train=True)


@pytest.fixture(scope="module")
def stacks():
  """Stacks of three blocks, scanned and written out, of equal variables."""
  block = functools.partial(
    native.FullyConnectedBlock,
    8,
    normalizer=functools.partial(nnx.BatchNorm, momentum=0.5),
    branch_scale=functools.partial(native.SkipInit, 0.5),
  )
  scanned = native.DepthStack(block, 3, rngs=nnx.Rngs(0))
  variables = {
    name: models.unroll_variables(tree)
    for name, tree in native.to_linen(scanned).items()
  }
  unrolled = []
  for remat in (False, True):
    make = functools.partial(native.DepthStack, block, 3, scan=False, remat=remat)
    unrolled.append(nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0))))
    native.from_linen(unrolled[-1], variables)
  remat = native.DepthStack(block, 3, remat=True, rngs=nnx.Rngs(0))
  return [scanned, remat, *unrolled]


def test_a_scan_keeps_the_dtype(stacks):
  x = jnp.ones((4, 8), jnp.bfloat16)
  # Their statistics are of use to other tests as they are.
  scanned, remat, unrolled, _ = nnx.clone(stacks)
  for stack in (scanned, remat):
    with pytest.raises(UsageError, match=r"bfloat16\[4, 8\] to float32\[4, 8\]"):
      stack(x)
  assert unrolled(x).dtype == jnp.float32


def test_stacks_are_equal_however_they_are_computed(stacks):
  x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
  kernels = stacks[0].blocks.dense1.kernel[...]
  assert kernels.shape == (3, 8, 8)
  # Each block has random numbers of its own.
  assert (kernels[0] != kernels[1]).all()

  @nnx.jit
  def run(stack):
    gradient = nnx.grad(lambda stack: jnp.square(stack(x)).sum())(stack)
    return native.to_linen(gradient)["params"], stack(x)

  results = []
  for stack in stacks:
    gradient, y = run(stack)
    variables = native.to_linen(stack) | {"params": gradient}
    if stack.scan:
      variables = {name: models.unroll_variables(v) for name, v in variables.items()}
    results.append((variables, y))
  chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)
  # The statistics have moved twice from zero.
  assert stacks[0].blocks.norm1.mean[...].all()


def test_program_size_does_not_grow_with_depth():
  def sizes(depth):
    make = functools.partial(native.WideResNet, depth, 1, 5, methods.get("batch_norm"))
    init = jax.make_jaxpr(lambda: nnx.state(make(rngs=nnx.Rngs(0)), nnx.Param))()
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    run = jax.make_jaxpr(lambda state: nnx.merge(graphdef, state)(IMAGES))(state)
    return [len(str(program).splitlines()) for program in (init, run)]

  assert sizes(16) == sizes(160)


def test_modes(small):
  method = dataclasses.replace(
    methods.get("batch_norm"), dropout_rate=0.5, drop_path=0.9
  )
  images = IMAGES[..., :1]
  model = native.WideResNet(16, 1, 5, method, in_features=1, rngs=nnx.Rngs(0))
  forward = nnx.jit(lambda model: model(images))
  trained = [forward(model) for _ in range(2)]
  # Two masks each of dropout and of stochastic depth; statistics move.
  assert (trained[0] != trained[1]).any()
  mean = model.head.norm.mean[...]
  assert mean.any()
  model.eval()
  np.testing.assert_array_equal(forward(model), forward(model))
  np.testing.assert_array_equal(model.head.norm.mean[...], mean)
  # Running statistics are other than the batch's.
  assert (forward(model) != trained[0]).any()


def test_stochastic_depth_leaves_out_branches_of_examples(small):
  method = dataclasses.replace(methods.get("unnormalized"), drop_path=0.5)
  model = native.WideResNet(16, 1, 5, method, rngs=nnx.Rngs(0))
  images = np.repeat(IMAGES[:1], 256, 0)
  x = model.stem(images)
  y = nnx.jit(lambda model, x: model._stages(x))(model, x)
  # The first of two blocks drops its branch with probability 1/4, the other with 1/2.
  sums, counts = np.unique(np.round(y.reshape(256, -1), 3), axis=0, return_counts=True)
  assert len(sums) == 4
  shares = np.sort(counts) / 256
  np.testing.assert_allclose(shares, [1 / 8, 1 / 8, 3 / 8, 3 / 8], atol=0.08)


def test_networks_that_do_not_exist():
  with pytest.raises(UsageError, match="depth is 11: a Wide-ResNet has"):
    native.WideResNet(11, 1, 5, "skipinit", rngs=nnx.Rngs(0))


def test_variables_go_both_ways(stacks):
  stack = nnx.clone(stacks[0])
  variables = native.to_linen(stack)
  assert variables.keys() == {"params", "batch_stats"}
  assert shapes(native.to_linen(nnx.state(stack))) == shapes(variables)
  changed = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, variables)
  native.from_linen(stack, changed)
  chex.assert_trees_all_equal(native.to_linen(stack), changed)
  for variables, message in (
    ({"params": changed["params"]}, "batch_stats/blocks/norm1/var' are missing"),
    (models.unroll_variables(changed), "'params/block0/norm1/bias'.* are unknown"),
    (jax.tree.map(lambda leaf: leaf[:2], changed), r"has shape \(2,\), not \(3,\)"),
  ):
    with pytest.raises(UsageError, match=message):
      native.from_linen(stack, variables)
