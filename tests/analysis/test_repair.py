"""Repaired networks against the derivation, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from skipinit_jax import layers, methods
from skipinit_jax.analysis import measure, repair
from skipinit_jax.analysis.branches import find_layers
from skipinit_jax.analysis.repair import _factors, _Inside
from skipinit_jax.errors import UsageError
from skipinit_jax.models import BasicBlock, ResidualMLP

WIDTH = 32
x = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
images = x[:2].reshape(2, 2, 2, 8)
orthogonal = nn.initializers.orthogonal


class Network(nn.Module):
  """A user's own scan, or blocks of several classes one after the other."""

  blocks: tuple
  length: int | None = None
  shared: bool = False

  @nn.compact
  def __call__(self, x):
    if self.length is None:
      for block in self.blocks:
        x = block(name=getattr(block, "func", block).__name__)(x)
      return x
    scan = nn.scan(
      lambda block, x, _: (block(x), None),
      variable_broadcast="params" if self.shared else False,
      variable_axes={"signal": 0} | ({} if self.shared else {"params": 0}),
      split_rngs={"params": not self.shared},
      length=self.length,
    )
    (block,) = self.blocks
    return scan(block(name="layers"), x, None)[0]


class Block(nn.Module):
  """x + f(x), with f as given."""

  branch: object = None

  @nn.compact
  def __call__(self, x):
    return x + self.branch(x)


def dense(scale=1.0, name=None):
  return nn.Dense(WIDTH, use_bias=False, kernel_init=orthogonal(scale), name=name)


def run(model, select=Block, **arguments):
  variables = jax.jit(model.init)(jax.random.key(0), x)
  blocks = measure.Blocks(select, shortcut="skip")
  return variables, repair(model, variables, x, blocks=blocks, **arguments)


def factors(repaired):
  return np.array([change.factor for change in repaired.changes])


def in_depth(branch, depth, **fields):
  return Network((functools.partial(Block, branch),), depth, **fields)


def test_independent_branches_add_one_in_d_each():
  """An orthogonal matrix keeps every norm, so that g is 1 / (3 sqrt(d))."""
  model = in_depth(lambda x: dense(3.0)(x), 12)
  variables, repaired = run(model)
  np.testing.assert_allclose(factors(repaired), factors(repaired)[0], rtol=1e-4)
  # By chance it may be a little less.
  assert 0.8 < factors(repaired)[0] * 3 * 12**0.5 < 1.0001
  assert [change.name for change in repaired.changes][::11] == ["layers/0", "layers/11"]
  assert repaired.after.forward_growth == pytest.approx(np.e, rel=0.3)
  kernel, scaled = (
    each["params"]["layers"]["Dense_0"]["kernel"]
    for each in (variables, repaired.variables)
  )
  np.testing.assert_allclose(scaled, kernel * factors(repaired)[:, None, None])
  assert f"layers/3: Dense_0 times {factors(repaired)[3]:.3g}" in str(repaired)
  assert str(repaired).startswith("The signal explodes")
  # What is healthy stays, and its parameters are the same arrays.
  again = repair(model, repaired.variables, x, blocks=measure.Blocks(Block))
  assert again.changes == () and "Nothing was changed" in str(again)
  assert again.variables["params"] is repaired.variables["params"]


def test_branches_that_are_the_skip_path_get_less():
  """(1 + g)^(2 d) <= e, where sums of squares would allow g = 1 / sqrt(d)."""

  def identity(x):
    return nn.Dense(WIDTH, kernel_init=lambda *_: jnp.eye(WIDTH))(x)

  _, repaired = run(in_depth(identity, 16))
  growth = np.prod((1 + factors(repaired)) ** 2)
  assert np.sqrt(np.e) < growth <= np.e


def test_the_backward_pass_counts_where_it_grows_faster():
  """sin(k x) has the second moment 1/2, its derivative that of k^2 / 2."""
  k, depth = 10.0, 8
  model = in_depth(lambda x: dense()(jnp.sin(k * x)), depth)
  _, repaired = run(model)
  np.testing.assert_allclose(factors(repaired), (2 / (depth * k**2)) ** 0.5, rtol=0.2)
  assert 1 < repaired.after.gradient_growth < np.e**1.3


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    init = orthogonal(3.0)
    self.dense = nnx.Linear(WIDTH, WIDTH, use_bias=False, kernel_init=init, rngs=rngs)
    self.drop = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return x + self.drop(self.dense(x))


class NnxNetwork(nnx.Module):
  def __init__(self, rngs):
    make = nnx.vmap(lambda rngs: NnxBlock(rngs), in_axes=0, out_axes=0)
    self.layers = nnx.split_rngs(splits=12)(make)(rngs)

  def __call__(self, x):
    scan = nnx.scan(
      lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry
    )
    return scan(self.layers, x)


def test_nnx_networks_are_repaired_by_their_state():
  """Dropout at 0.1 adds a ninth to the branch's second moment."""
  model = NnxNetwork(nnx.Rngs(0))
  kernel = model.layers.dense.kernel[...].copy()
  repaired = repair(model, x, blocks=measure.Blocks(NnxBlock))
  np.testing.assert_array_equal(model.layers.dense.kernel[...], kernel)
  assert repaired.changes[3].name == "layers/3" and len(repaired.changes) == 12
  assert (factors(repaired) * 3 * (12 / 0.9) ** 0.5 > 0.8).all()
  assert (factors(repaired) * 3 * (12 / 0.9) ** 0.5 < 1.05).all()
  nnx.update(model, repaired.variables)
  np.testing.assert_allclose(
    model.layers.dense.kernel[...], kernel * factors(repaired)[:, None, None]
  )
  again = repair(model, x, blocks=measure.Blocks(NnxBlock))
  assert again.changes == ()


def test_blocks_that_share_their_weights_have_one_factor():
  # As many blocks as rows of the kernel, which has no axis over them.
  _, repaired = run(in_depth(lambda x: dense()(nn.relu(x)), WIDTH, shared=True))
  assert len(repaired.changes) == WIDTH
  assert len(set(factors(repaired))) == 1
  assert 1 < repaired.after.forward_growth < np.e


def test_of_several_batches_and_calls_the_smallest_factor_counts():
  first = {(("a",), 0): np.array([0.3, 0.1]), (("a",), 1): np.array([0.2, 0.4])}
  second = {(("a",), 0): np.array([0.5, 0.5]), (("a",), 1): np.array([0.1, 0.7])}
  passes = [
    {call: {"factor": factor} for call, factor in each.items()}
    for each in (first, second)
  ]
  assert _factors(passes, "measured")["a",].tolist() == [0.1, 0.1]
  assert _factors(passes, "inverse_sqrt_depth")["a",].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("to", "factor"), [("zero", 0.0), ("inverse_sqrt_depth", 0.2)])
def test_other_factors_on_request(to, factor):
  model = ResidualMLP(25, WIDTH, 10, methods.get("unnormalized"))
  variables = jax.jit(functools.partial(model.init, train=True))(jax.random.key(0), x)
  repaired = repair(model, variables, x, to=to)
  assert not repaired.before.healthy
  np.testing.assert_allclose(factors(repaired), factor)
  if not factor:
    assert repaired.after.forward_growth == 1


class Attention(nn.Module):
  """A Transformer's two branches, in which dropout follows the last layers."""

  @nn.compact
  def __call__(self, x):
    tokens = nn.LayerNorm()(x)[:, None].repeat(3, 1)
    attention = nn.MultiHeadDotProductAttention(2, name="attention")
    drop = nn.Dropout(0.1, deterministic=True)
    x = x + 9 * drop(attention(tokens)[:, 0])
    y = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
    return x + drop(9 * nn.Dense(WIDTH, name="mlp")(y))


class NormLast(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + nn.LayerNorm(scale_init=nn.initializers.constant(30.0))(dense()(x))


class PostNorm(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.LayerNorm()(x + 9 * dense(name="last")(nn.relu(dense()(x))))


class OwnScale(nn.Module):
  @nn.compact
  def __call__(self, x):
    gamma = self.param("gamma", nn.initializers.constant(20.0), (WIDTH,))
    return x + gamma * jax.checkpoint(lambda y: nn.relu(y))(dense()(x))


class Standardized(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = layers.WeightStandardizedDense(WIDTH, name="last")(nn.relu(dense()(x)))
    return x + layers.SkipInit(20.0, learnable=False)(y)


class Transition(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = 9 * nn.remat(nn.Dense)(2 * WIDTH, name="last")(nn.relu(x))
    return nn.Dense(2 * WIDTH, name="skip")(x) + y


@pytest.mark.parametrize(
  ("block", "last"),
  [
    (Attention, ("attention/out", "mlp")),
    (NormLast, ("LayerNorm_0",)),
    (PostNorm, ("last",)),
    (OwnScale, ("Dense_0",)),
    (Standardized, ("last",)),
    (Transition, ("last",)),
    (functools.partial(BasicBlock, 8, strides=2), ("conv2",)),
    (functools.partial(BasicBlock, 8, branch_scale=layers.LayerScale), ("conv2",)),
    (
      functools.partial(
        BasicBlock, 8, conv=layers.WeightStandardizedConv, branch_scale=layers.SkipInit
      ),
      ("conv2",),
    ),
  ],
)
def test_last_layers_are_found(block, last):
  assert tuple(map("/".join, find(block))) == last


def find(block, patterns=None):
  features = images if "Basic" in str(block) else x
  shapes = jax.eval_shape(block().init, jax.random.key(0), features)
  variables = jax.tree.map(jnp.zeros_like, shapes)

  def call(x, observe):
    with nn.intercept_methods(_Inside(observe)):
      return block().apply(variables, x)

  shortcut = "projection" if features is images else "skip"
  return find_layers(call, features, shortcut, patterns, ("block",))


def test_what_scales_a_last_layer_is_changed_alone():
  kinds = (NormLast, Standardized, Transition)
  variables, repaired = run(Network(kinds), kinds)
  before, after = (each["params"] for each in (variables, repaired.variables))
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  # A standardized kernel has no scale, and its own parameter of that name is changed.
  last = changed["Standardized"]["last"]
  assert (last["kernel"], last["scale"]) == (False, True)
  assert changed["NormLast"] == {
    "Dense_0": {"kernel": False},
    "LayerNorm_0": {"bias": False, "scale": True},
  }
  assert changed["Transition"]["skip"] == {"bias": False, "kernel": False}
  assert changed["Transition"]["last"]["kernel"]
  assert repaired.after.forward_growth < np.e * 2


class Unscaled(nn.Module):
  """A layer whose kernel has no scale, and no parameter beside it."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param("w", orthogonal(), (WIDTH, WIDTH))
    return 3 * x @ layers.standardize(kernel)


def bounded(x):
  return 99 * jnp.sin(dense(30.0)(x))


@pytest.mark.parametrize(
  ("branch", "message"),
  [
    (lambda x: Unscaled(name="last")(x), "not become smaller with .* of 'last'"),
    (lambda x: dense(9.0)(x) - x, "'layers' has no skip path"),
  ],
)
def test_branches_that_cannot_be_scaled(branch, message):
  with pytest.raises(UsageError, match=message):
    run(in_depth(branch, 6))


@pytest.mark.parametrize(
  ("patterns", "message"),
  [
    (None, r"'block' is not found: .* modules with parameters \('Dense_0'\)"),
    (["conv*", "out"], r"is none of conv\*, out: name it by last_layers"),
  ],
)
def test_last_layers_that_are_not_found(patterns, message):
  with pytest.raises(UsageError, match=message):
    find(functools.partial(Block, bounded), patterns)


def test_the_last_layer_is_told():
  """A nonlinear function of g, which is met by lowering the branches' share."""
  _, repaired = run(in_depth(bounded, 6), last_layers="Dense_*")
  assert repaired.after.forward_growth < np.e
  assert (factors(repaired) < 1e-3).all()


class Divided(nn.Module):
  @nn.compact
  def __call__(self, x):
    return (x + dense()(x)) / 9


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch": x[:1]}, r"has 1 example\(s\)"),
    ({"batch": x * np.nan}, "batch has values that are not finite"),
    ({"more_batches": [x, x * np.inf]}, "batch has values that are not finite, in 2"),
    ({"variables": {"params": {"a": np.inf}}}, "not finite, in params/a"),
    ({"blocks": measure.Blocks("conv*")}, r"Unknown block 'conv\*'"),
    ({"to": "one"}, "Unknown target `to` 'one'"),
    ({}, "not enough: with them scaled, The signal vanishes .* Leave the sum"),
    ({"model": Network((Divided,), 99)}, "The signal vanishes .* Leave the sum"),
  ],
)
def test_what_is_refused(change, message):
  given = {"batch": x, "blocks": measure.Blocks(Divided)} | change
  model = given.pop("model", Network((Divided,), 8))
  variables = given.pop("variables", None) or model.init(jax.random.key(0), x)
  with pytest.raises(UsageError, match=message):
    repair(model, variables, given.pop("batch"), **given)
