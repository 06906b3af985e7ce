"""The signal of NNX networks, against Linen's and against that of plain functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skipinit_jax import analysis, methods, models
from skipinit_jax import nnx as native
from skipinit_jax.analysis import measure
from skipinit_jax.errors import UsageError
from skipinit_jax.models.depth import Stages

ROWS = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
IMAGES = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)


class Block(nnx.Module):
  """A user's block, which knows nothing of this package."""

  def __init__(self, rngs, dropout=0.0):
    self.linear = nnx.Linear(8, 8, rngs=rngs)
    self.dropout = nnx.Dropout(dropout, rngs=rngs)

  def __call__(self, x):
    return x + 2 * self.dropout(self.linear(nnx.relu(x)))


class Layer(nnx.Module):
  """Two blocks that take turns."""

  def __init__(self, rngs):
    self.one, self.two = Block(rngs), Block(rngs)

  def __call__(self, x):
    return self.two(self.one(x))


class Network(nnx.Module):
  """Layers in one of several forms."""

  def __init__(self, rngs, form="scan", depth=3, dropout=0.0):
    self.form = form
    if form in ("scan", "lax"):
      make = nnx.vmap(lambda rngs: Layer(rngs), in_axes=0, out_axes=0)
      self.layers = nnx.split_rngs(splits=depth)(make)(rngs)
    else:
      self.layers = nnx.List([Block(rngs, dropout) for _ in range(depth)])
    self.head = nnx.Linear(8, 4, rngs=rngs)

  def __call__(self, x):
    if self.form == "scan":
      apply = nnx.remat(lambda x, layer: layer(x))
      x = nnx.scan(apply, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
    elif self.form == "lax":
      graphdef, state = nnx.split(self.layers)
      x, _ = jax.lax.scan(
        lambda x, state: (nnx.merge(graphdef, state)(x), None), x, state
      )
    elif self.form == "shared":
      for _ in range(3):
        x = self.layers[0](x)
    else:
      for layer in self.layers:
        x = nnx.jit(lambda layer, x: layer(x))(layer, x)
    return self.head(x)


BLOCKS = measure.Blocks(select=Block)


def functions(network):
  """The blocks of a network, one after the other."""
  if network.form == "shared":
    return [network.layers[0]] * 3
  if network.form == "list":
    return list(network.layers)
  parts = nnx.split(network.layers)
  layers = [
    nnx.merge(parts[0], jax.tree.map(lambda leaf, i=i: leaf[i], parts[1]))
    for i in range(3)
  ]
  return [block for layer in layers for block in (layer.one, layer.two)]


def same(signal, expected):
  for name in (
    "second_moment",
    "cosine",
    "branch_variance",
    "gradient_second_moment",
    "head",
  ):
    np.testing.assert_allclose(
      getattr(signal, name), getattr(expected, name), rtol=1e-4, err_msg=name
    )


@pytest.mark.parametrize(
  ("form", "select", "names"),
  [
    (
      "scan",
      Block,
      [f"layers/{part}/{i}" for i in range(3) for part in ("one", "two")],
    ),
    ("list", "layers/*", [f"layers/{i}" for i in range(3)]),
    ("shared", Block, [f"layers/0 (call {i})" for i in (1, 2, 3)]),
  ],
)
def test_blocks_of_a_user(form, select, names):
  network = Network(nnx.Rngs(0), form)
  signal = measure.signal(network, ROWS, blocks=measure.Blocks(select=select))
  expected = measure.signal_of_functions(functions(network), ROWS, head=network.head)
  assert list(signal.names) == names
  same(signal, expected)


def test_networks_of_this_package_measure_as_their_twins(monkeypatch):
  stages = Stages(models.BasicBlock, 2, [3], [3], [2])
  monkeypatch.setattr(models.WideResNet, "stages", lambda self: stages)
  method = methods.get("batch_norm")
  network = native.WideResNet(22, 1, 5, method, rngs=nnx.Rngs(0))
  twin = models.WideResNet(22, 1, 5, method)
  variables = native.to_linen(network)
  # Diagnosis is of training, whatever the mode.
  network.eval()
  verdict = analysis.diagnose(network, IMAGES)
  expected = measure.signal(twin, variables, IMAGES, train=True)
  assert verdict == analysis.diagnose_signal(expected)
  # Nothing has changed: no statistics, no mode.
  jax.tree.map(np.testing.assert_array_equal, native.to_linen(network), variables)
  assert network.head.norm.use_running_average

  network.train()
  signal = measure.signal(network, IMAGES)
  same(signal, expected)
  np.testing.assert_allclose(signal.moving_variance, expected.moving_variance)
  assert signal.names == expected.names


def test_alpha_and_projection_are_seen():
  block = functools.partial(native.BasicBlock, branch_scale=native.SkipInit)
  network = nnx.Sequential(
    block(3, 4, strides=2, rngs=nnx.Rngs(0)), block(4, 4, rngs=nnx.Rngs(1))
  )
  signal = measure.signal(network, IMAGES)
  assert signal.alpha.tolist() == [0, 0]
  # The branch is zero, and the projection is the skip path.
  np.testing.assert_array_equal(signal.branch_second_moment, 0)
  np.testing.assert_allclose(signal.skip_second_moment, signal.second_moment[1:])


def test_a_network_stays_as_it_is():
  network = Network(nnx.Rngs(0), "list", dropout=0.5)
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(network, nnx.RngCount)))
  graphdef = nnx.graphdef(network)
  verdict = analysis.diagnose(network, ROWS, blocks=BLOCKS)
  assert nnx.graphdef(network) == graphdef
  assert type(network.layers[0]) is Block
  after = nnx.to_pure_dict(nnx.state(network, nnx.RngCount))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  # In evaluation dropout would leave more of each branch than noise.
  network.eval()
  assert analysis.diagnose(network, ROWS, blocks=BLOCKS) == verdict


def test_an_ensemble_of_seeds():
  key = jax.random.key(3)
  ensemble = measure.over_seeds(
    functools.partial(Network, form="list"), ROWS, num_seeds=2, blocks=BLOCKS, key=key
  )
  for index, of_seed in enumerate(jax.random.split(key, 2)):
    init_key, rest = jax.random.split(of_seed)
    network = Network(nnx.Rngs(init_key), "list")
    alone = measure.signal(network, ROWS, blocks=BLOCKS, key=rest)
    same(jax.tree.map(lambda leaf, i=index: leaf[i], ensemble.signals), alone)


def test_what_cannot_be_measured():
  network = Network(nnx.Rngs(0), "list")
  with pytest.raises(UsageError, match=r"'blocks/\*': choose one of head, la"):
    measure.signal(network, ROWS, blocks=measure.Blocks(select="blocks/*"))
  with pytest.raises(UsageError, match=r"of class ResidualBlock: .* \(Block, "):
    analysis.diagnose(network, ROWS)
  with pytest.raises(UsageError, match="three arguments, but a network of NNX"):
    measure.signal(network, {}, ROWS, blocks=BLOCKS)
  with pytest.raises(UsageError, match="model is a Network, which has its values"):
    measure.over_seeds(network, ROWS, num_seeds=2, blocks=BLOCKS)
  with pytest.raises(UsageError, match="at least 2"):
    measure.signal(network, ROWS[:1], blocks=BLOCKS)
  with pytest.raises(UsageError, match="'layers/one' is inside a loop that drops"):
    measure.signal(Network(nnx.Rngs(0), "lax"), ROWS, blocks=BLOCKS)


def test_within_a_users_compiled_function():
  network = Network(nnx.Rngs(0), "shared")
  compiled = nnx.jit(lambda network, x: measure.signal(network, x, blocks=BLOCKS))
  same(
    compiled(network, jnp.asarray(ROWS)), measure.signal(network, ROWS, blocks=BLOCKS)
  )
