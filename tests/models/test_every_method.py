"""Every method in every model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.layers import Conv, LayerScale, SkipInit
from skipinit_jax.methods import bind_normalizer
from skipinit_jax.models import ResidualMLP, ResNet, VisionTransformer, WideResNet
from skipinit_jax.models.head import Head
from tests.models.common import random_variables

CLASSES = 7
# Model, and its number of residual branches.
MODELS = {
  "wide_resnet": (functools.partial(WideResNet, 16, 1, CLASSES), 6),
  "resnet_v1": (functools.partial(ResNet, 50, CLASSES, version=1), 16),
  "resnet_v2": (functools.partial(ResNet, 18, CLASSES, version=2), 8),
  "mlp": (functools.partial(ResidualMLP, 5, 8, CLASSES), 5),
  # An attention branch and an MLP branch in each of five layers.
  "transformer": (functools.partial(VisionTransformer, 5, 8, CLASSES, num_heads=2), 10),
}
UNDEFINED = {
  "resnet_v1": ["nf_resnet"],
  "transformer": ["fixup", "fixup_dropout", "nf_resnet"],
}
IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


class Halve(nn.Module):
  """A user's normalizer that knows nothing of training or dtypes."""

  @nn.compact
  def __call__(self, x):
    return x / 2


def shapes(model, *, train=True):
  keys = dict.fromkeys(("params", "dropout"), jax.random.key(0))
  return jax.eval_shape(lambda: model.init_with_output(keys, IMAGES, train=train))


def leaves(variables, name):
  """Paths and leaves of a name, below any module."""
  found = jax.tree_util.tree_leaves_with_path(variables)
  return {
    tuple(key.key for key in path[:-1]): leaf
    for path, leaf in found
    if path[-1].key == name
  }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", methods.NAMES)
def test_every_method_in_every_model(model, name):
  factory, num_blocks = MODELS[model]
  method = methods.get(name)
  if name in UNDEFINED.get(model, ()):
    with pytest.raises(UsageError, match=f"'{name}' is not defined for a "):
      factory(method=method)
    return
  logits, variables = shapes(factory(method=method, dtype=jnp.bfloat16))
  assert (logits.shape, logits.dtype) == ((4, CLASSES), FLOAT32)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {FLOAT32}
  params = variables["params"]

  # One alpha a block, whether scanned or not.
  alphas = sum(leaf.size for leaf in leaves(params, "alpha").values())
  scalar = method.alpha is not None and method.branch_scale is SkipInit
  assert alphas == (num_blocks if scalar and method.learnable_alpha else 0)

  scales = leaves(params, "scale")
  kernels = set(leaves(params, "kernel"))
  standardized = {path for path in scales if path in kernels}
  assert standardized == (
    set() if method.conv is Conv else kernels - {("head", "classifier")}
  )
  by_channel = {path for path in scales if path[-1] == "branch_scale"}
  assert bool(by_channel) == (method.branch_scale is LayerScale)
  normalizers = dict.fromkeys(set(scales) - standardized - by_channel)
  statistics = leaves(variables.get("batch_stats", {}), "var")
  by_batch = name != "layer_norm"
  assert statistics.keys() == (normalizers.keys() if by_batch else set())
  if method.output_normalizer is not None:
    assert set(normalizers) == {("head", "norm")}
  elif method.normalizer is None:
    assert not normalizers
  else:
    assert len(normalizers) > 1

  # Every layer but the stem has a bias in the variants with biases, in NF-ResNets the
  # stem too, and otherwise only the classifier. Scalars and normalizers are others.
  layers = set(leaves(params, "kernel"))
  biased = layers & set(leaves(params, "bias"))
  without_stem = layers if name == "nf_resnet" else layers - {("stem",)}
  assert biased == (without_stem if method.use_bias else {("head", "classifier")})

  scalar_biases = [p for p in leaves(params, "bias") if p[-1].endswith("_bias")]
  assert bool(scalar_biases) == any(
    p[-1].startswith(("layer_bias", "branch_bias")) for p in scalar_biases
  )
  assert bool(scalar_biases) == method.scalar_biases


@pytest.mark.parametrize(
  ("model", "fields", "message"),
  [
    *(
      ("wide_resnet", {"depth": depth}, rf"depth is {depth}: .*6 n \+ 4.*{hint}")
      for depth, hint in ((27, "22 or 28"), (31, "28 or 34"), (4, "10 or 16"), (-8, 10))
    ),
    *(
      ("resnet_v2", {"depth": depth}, f"depth is {depth}: .*18, 34, 50, 101, 152, 200")
      for depth in (20, 51, -50)
    ),
    *(("resnet_v2", {"version": each}, rf"version.*{each!r}") for each in (0, 3, "2")),
    *(
      (model, {field: 0}, f"{field} is 0")
      for model, fields in (
        ("wide_resnet", "width num_classes"),
        ("resnet_v2", "num_classes"),
        ("mlp", "depth width num_classes layers_per_block"),
        ("transformer", "depth num_heads patch_size"),
      )
      for field in fields.split()
    ),
    ("transformer", {"num_heads": 3}, "width is 8: it is not a multiple of num_heads"),
  ],
)
def test_networks_that_do_not_exist(model, fields, message):
  known = MODELS[model][0](method=methods.get("skipinit"))
  with pytest.raises(UsageError, match=message):
    known.clone(**fields)


@pytest.mark.parametrize(
  ("model", "factory", "has_statistics"),
  [
    ("mlp", nn.LayerNorm, False),
    ("mlp", functools.partial(nn.GroupNorm, num_groups=4), False),
    ("mlp", nn.BatchNorm, True),
    ("mlp", functools.partial(nn.BatchNorm, momentum=0.5), True),
    ("mlp", lambda **fields: nn.BatchNorm(**fields), True),
    ("mlp", Halve, False),
    *((model, nn.BatchNorm, True) for model in MODELS if model != "mlp"),
  ],
)
def test_a_method_of_ones_own(model, factory, has_statistics):
  build, _ = MODELS[model]
  method = dataclasses.replace(methods.get("unnormalized"), normalizer=factory)
  _, variables = shapes(build(method=method))
  assert ("batch_stats" in variables) == has_statistics
  names = set(leaves(variables["params"], "scale"))
  assert ("stack", "blocks", "norm1") in names or model != "mlp" or factory is Halve
  assert bool(names) == (factory is not Halve)


def bind(factory, train=True):
  dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}
  return bind_normalizer(factory, train=train, **dtypes)(name=None)


def test_normalizer_gets_what_it_accepts():
  assert bind(nn.BatchNorm, train=True).use_running_average is False
  assert bind(nn.BatchNorm, train=False).use_running_average is True
  for factory in (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm):
    assert bind(factory).dtype == jnp.bfloat16
    assert bind(factory).param_dtype == jnp.float32
  assert isinstance(bind(Halve), Halve)
  # What a partial sets stays.
  frozen = functools.partial(nn.BatchNorm, use_running_average=True, dtype=jnp.float32)
  module = bind(frozen, train=True)
  assert (module.use_running_average, module.dtype) == (True, jnp.float32)


def branch_scale(method, num_blocks=4, param_dtype=jnp.float32):
  fields = method.block_fields(
    num_blocks=num_blocks, train=True, dtype=jnp.float32, param_dtype=param_dtype
  )
  return fields["branch_scale"]


def test_a_normalizer_without_a_scale_cannot_start_at_zero():
  method = dataclasses.replace(
    methods.get("batch_norm_zero_scale"), normalizer=Halve, name="halve"
  )
  with pytest.raises(UsageError, match="normalizer of method 'halve' has no field"):
    shapes(MODELS["mlp"][0](method=method))


@pytest.mark.parametrize("model", MODELS)
def test_alpha_may_depend_on_the_number_of_branches(model):
  factory, num_blocks = MODELS[model]
  alphas = set()

  def branch_scale(initial_value, **fields):
    alphas.add(initial_value)
    return SkipInit(initial_value, **fields)

  method = dataclasses.replace(
    methods.get("skipinit"), alpha=float, branch_scale=branch_scale
  )
  shapes(factory(method=method))
  assert alphas == {num_blocks}


class ChannelScale(nn.Module):
  """A user's scale of a branch that can do nothing else."""

  initial_value: float

  @nn.compact
  def __call__(self, x):
    start = nn.initializers.constant(self.initial_value)
    return x * self.param("scale", start, x.shape[-1:])


@pytest.mark.parametrize("model", MODELS)
def test_a_branch_scale_of_ones_own(model):
  factory, _ = MODELS[model]
  method = dataclasses.replace(methods.get("skipinit"), branch_scale=ChannelScale)
  _, variables = shapes(factory(method=method))
  scales = leaves(variables["params"], "scale")
  assert {path[-1] for path in scales} == {"branch_scale"}
  # The features of each block's output, on the last axis.
  assert all(leaf.shape[-1] >= 8 for leaf in scales.values())
  for changes, field in (
    ({"learnable_alpha": False}, "learnable"),
    ({"branch_factor": 0.2}, "factor"),
  ):
    with pytest.raises(UsageError, match=f"'skipinit' has no field `{field}`"):
      shapes(factory(method=dataclasses.replace(method, **changes)))


def test_what_a_branch_scale_is_given():
  def scale(**changes):
    method = dataclasses.replace(methods.get("skipinit_one"), **changes)
    return branch_scale(method, param_dtype=jnp.bfloat16)()

  bfloat16 = {"param_dtype": jnp.bfloat16}
  assert scale() == SkipInit(1.0, **bfloat16)
  assert scale(learnable_alpha=False) == SkipInit(1.0, False, **bfloat16)
  assert scale(branch_factor=0.2) == SkipInit(1.0, factor=0.2, **bfloat16)
  # timm's NF-ResNets have the constant alone.
  constant = SkipInit(0.2, learnable=False)
  assert scale(branch_factor=0.2, alpha=None) == constant
  assert scale(branch_scale=LayerScale) == LayerScale(1.0, True, jnp.bfloat16)
  assert scale(branch_scale=ChannelScale) == ChannelScale(1.0)
  bound = functools.partial(LayerScale, param_dtype=jnp.float32)
  assert scale(branch_scale=bound) == LayerScale(1.0, True, jnp.float32)
  assert branch_scale(methods.get("unnormalized")) is None


def head(method, **fields):
  return Head(CLASSES, methods.get(method), **fields)


IDENTITY = {
  "params": {"classifier": {"kernel": jnp.eye(CLASSES), "bias": jnp.zeros(7)}}
}


def test_head_averages_bfloat16_in_float32():
  x = jnp.full((1, 64, 64, CLASSES), 1.0, jnp.bfloat16).at[:, 0, 0].set(4096.0)
  logits = head("unnormalized", dtype=jnp.bfloat16).apply(IDENTITY, x, train=False)
  np.testing.assert_allclose(logits, (4096 + 4095) / 4096, rtol=1e-6)


def test_dropout_only_in_training():
  x = np.ones((2000, CLASSES), np.float32)
  module = head("regularized_skipinit")
  # Needs no random state.
  np.testing.assert_array_equal(module.apply(IDENTITY, x, train=False), x)
  kept = module.apply(IDENTITY, x, train=True, rngs={"dropout": jax.random.key(0)})
  share = np.mean(kept == 0)
  assert abs(share - 0.2) < 5 * np.sqrt(0.2 * 0.8 / x.size)
  np.testing.assert_allclose(kept[kept != 0], 1 / 0.8, rtol=1e-6)
  other = module.apply(IDENTITY, x, train=True, rngs={"dropout": jax.random.key(1)})
  assert np.any(kept != other)


@pytest.mark.parametrize(
  ("model", "method"),
  [
    ("wide_resnet", "batch_norm"),
    ("mlp", "output_batch_norm"),
    ("mlp", "fixup_dropout"),
  ],
)
def test_evaluation_treats_examples_one_by_one(model, method):
  module = MODELS[model][0](method=methods.get(method))
  images = IMAGES[:, :8, :8]
  variables = random_variables(module, images, train=False)
  apply = jax.jit(functools.partial(module.apply, train=False))
  together = apply(variables, images)
  alone = apply(variables, images[2:3])
  assert np.std(together) > 1e-3
  np.testing.assert_allclose(alone, together[2:3], rtol=1e-4, atol=1e-5)
