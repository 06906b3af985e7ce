"""Small networks of the families that people train, healthy and broken.

Each is written as its users write it, in plain Flax, and is tiny: a few features, 8x8
digits or 16 tokens of them. What differs between variants of a family is a `Form`.
Every variant is a model of its own in `skipinit_jax.models`, by the name of
`model_name`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax import layers, methods, models
from skipinit_jax.analysis import measure
from skipinit_jax.methods import ModuleFactory

INVERSE_SQRT = -1.0

_TOKENS = 16
_VALUES = 17


@dataclasses.dataclass(frozen=True)
class Form:
  """What makes a network healthy or not.

  Attributes:
    norm: where the normalizers are: "pre" before the branch, "post" behind the sum,
      "final" only before the head, or "none".
    scale: initial value of a learnable factor on each feature of a branch; None: there
      is no factor; `INVERSE_SQRT`: one over the root of the number of branches.
    sum_scale: a constant factor on each sum.
    embedding: standard deviation of embeddings of tokens and positions.
    dropout: rate, at the end of each branch.
  """

  norm: str = "pre"
  scale: float | None = None
  sum_scale: float = 1.0
  embedding: float = 1.0
  dropout: float = 0.0


class Block(nn.Module):
  """x + f(x), as the form has it.

  Attributes:
    branch: factory of f.
    norm: factory of normalizers.
    form: the form.
    train: whether there is dropout.
  """

  branch: ModuleFactory
  norm: ModuleFactory
  form: Form
  train: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps features to features of the same shape."""
    form = self.form
    y = self.norm(name="norm")(x) if form.norm == "pre" else x
    y = self.branch(name="branch")(y)
    if form.scale is not None:
      y *= self.param("scale", nn.initializers.constant(form.scale), (y.shape[-1],))
    y = nn.Dropout(form.dropout, deterministic=not self.train)(y)
    x = (x + y) * form.sum_scale
    return self.norm(name="norm")(x) if form.norm == "post" else x


BLOCKS = measure.Blocks((Block, models.ResidualBlock))
"""The blocks of each of these networks."""


class Attention(nn.Module):
  """Self-attention of four heads."""

  causal: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps tokens [N, T, C] to [N, T, C]."""
    mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
    return nn.MultiHeadDotProductAttention(4)(x, mask=mask)


class MLP(nn.Module):
  """Two dense layers, behind a depthwise convolution in ConvNeXt."""

  norm: ModuleFactory | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps features [..., C] to [..., C]."""
    features = x.shape[-1]
    if self.norm is not None:
      x = nn.Conv(features, (3, 3), feature_group_count=features)(x)
      x = self.norm()(x)
    return nn.Dense(features)(nn.gelu(nn.Dense(4 * features)(x)))


class Convolutions(nn.Module):
  """Convolutions of these features and sizes, each behind an activation."""

  shape: tuple[tuple[int, int], ...]
  norm: ModuleFactory | None
  activation: str = "relu"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [N, H, W, C] to [N, H, W, features of the last]."""
    for index, (features, size) in enumerate(self.shape):
      # The block itself normalizes what it gives the branch.
      if index and self.norm is not None:
        x = self.norm()(x)
      x = getattr(nn, self.activation)(x)
      x = layers.Conv(features, (size, size), kernel_init=layers.he_normal)(x)
    return x


class _Layer(nn.Module):
  blocks: tuple[ModuleFactory, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for index, block in enumerate(self.blocks):
      x = block(name=f"block{index}")(x)
    return x


class Network(nn.Module):
  """A network of any of these families but NF-ResNet.

  Attributes:
    family: a key of `VARIANTS`.
    depth: layers: two blocks each in Transformers, one in the others.
    form: the form.
    num_classes: number of logits.
  """

  family: str
  depth: int
  form: Form
  num_classes: int

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [N, 8, 8, 1] to logits [N, num_classes]."""
    norm: ModuleFactory = nn.LayerNorm
    branches: list[ModuleFactory] = []
    inner = None if self.form.norm in ("none", "final") else norm
    if self.family in ("GPT", "ViT"):
      x = self._tokens(images)
      branches = [functools.partial(Attention, self.family == "GPT"), MLP]
    elif self.family == "ConvNeXt":
      x = nn.Conv(24, (2, 2), 2)(images)
      branches = [functools.partial(MLP, inner)]
    else:
      if self.family == "U-Net":
        norm = functools.partial(nn.GroupNorm, 4)
      else:
        norm = functools.partial(nn.BatchNorm, not train, momentum=0.9)
      x = layers.Conv(16, (3, 3))(images)
    if self.family == "U-Net":
      x = self._u_net(x, norm, train)
    elif self.family == "bottleneck":
      shape = ((6, 1), (6, 3), (24, 1))
      inner = None if inner is None else norm
      x = layers.Conv(24, (2, 2), (2, 2))(x)
      x = self._stack([functools.partial(Convolutions, shape, inner)], norm, train)(x)
    elif self.family == "ConvNeXt":
      # As there, the only normalizer of a block is within its branch.
      form = dataclasses.replace(self.form, norm="none")
      block = functools.partial(Block, branches[0], norm, form, train)
      x = models.DepthStack(functools.partial(_Layer, (block,)), self.depth)(x)
    else:
      x = self._stack(branches, norm, train)(x)
    if self.form.norm in ("pre", "final"):
      x = norm(name="last_norm")(x)
    x = x[:, -1] if self.family == "GPT" else x.mean(tuple(range(1, x.ndim - 1)))
    return nn.Dense(self.num_classes)(x)

  def _stack(
    self,
    branches: list[ModuleFactory],
    norm: ModuleFactory,
    train: bool,
    depth: int | None = None,
  ) -> nn.Module:
    blocks = [
      functools.partial(Block, each, norm, self.form, train) for each in branches
    ]
    layer = functools.partial(_Layer, tuple(blocks))
    return models.DepthStack(layer, depth or self.depth)

  def _tokens(self, images: jax.Array) -> jax.Array:
    """Returns a token of 32 features for each 2x2 patch."""
    size = len(images)
    patches = images.reshape(size, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4)
    patches = patches.reshape(size, _TOKENS, 4)
    init = nn.initializers.normal(self.form.embedding)
    if self.family == "ViT":
      x = nn.Dense(32)(patches)
    else:
      # Brightness, in steps, is a vocabulary.
      tokens = jnp.clip(jnp.round(4 * patches.mean(-1) + 4), 0, _VALUES - 1)
      x = nn.Embed(_VALUES, 32, embedding_init=init)(tokens.astype(jnp.int32))
    return x + self.param("positions", init, (_TOKENS, 32))

  def _u_net(self, x: jax.Array, norm: ModuleFactory, train: bool) -> jax.Array:
    inner = None if self.form.norm in ("none", "final") else norm

    def blocks(features: int) -> nn.Module:
      shape = ((features, 3),) * 2
      branch = functools.partial(Convolutions, shape, inner, "silu")
      return self._stack([branch], norm, train, self.depth // 3)

    high = blocks(16)(x)
    low = blocks(24)(layers.Conv(24, (3, 3), (2, 2))(high))
    low = jnp.repeat(jnp.repeat(low, 2, 1), 2, 2)
    return blocks(16)(layers.Conv(16, (3, 3))(jnp.concatenate([high, low], -1)))


_nf_resnet = methods.get("nf_resnet")
_ROOT = 0.5**0.5
_PRE, _NONE = Form(), Form("none")
_small = functools.partial(dataclasses.replace, _PRE, embedding=0.02)
_Variant = tuple[Form | methods.Method | str, tuple[int, ...], tuple[int, ...]]

VARIANTS: dict[str, dict[str, _Variant]] = {
  "GPT": {
    "pre-norm": (_PRE, (6,), (24,)),
    "pre-norm, embeddings of 0.02": (_small(), (), (12,)),
    "pre-norm, scale 1 / sqrt(2 L), dropout": (
      _small(scale=INVERSE_SQRT, dropout=0.1),
      (12,),
      (),
    ),
    "pre-norm, divided by sqrt(2)": (_small(sum_scale=_ROOT), (24,), (48,)),
    "post-norm": (Form("post"), (12, 20, 100), (6, 60)),
    "no norm": (_NONE, (3, 16), (10,)),
    "no norm, scale 1 / sqrt(2 L)": (Form("none", INVERSE_SQRT), (), (16,)),
  },
  "ViT": {
    "pre-norm": (_PRE, (6,), ()),
    "pre-norm, dropout": (Form(dropout=0.1), (), (12,)),
    "post-norm": (Form("post"), (12, 16, 20, 24, 60), (6,)),
    "no norm": (_NONE, (16,), (24,)),
    "no norm, divided by sqrt(2)": (Form("none", sum_scale=_ROOT), (48,), ()),
    "norm before the head only": (Form("final"), (), (8,)),
    "no norm, alpha = 0": (Form("none", 0.0), (), (24,)),
  },
  "ConvNeXt": {
    "LayerScale of 1e-6": (Form(scale=1e-6), (), (12,)),
    "no LayerScale": (_PRE, (12,), ()),
    "no norm": (_NONE, (30,), (24,)),
  },
  "U-Net": {
    "group norm": (_PRE, (6,), (12,)),
    "no norm": (_NONE, (30,), (24,)),
    "no norm, alpha = 0": (Form("none", 0.0), (), (12,)),
  },
  "bottleneck": {
    "batch norm": (_PRE, (16,), (32,)),
    "no norm": (_NONE, (32,), (8,)),
    "no norm, scale 1 / sqrt(L)": (Form("none", INVERSE_SQRT), (), (16,)),
    "norm before the head only": (Form("final"), (16,), ()),
    "batch norm, divided by sqrt(2)": (Form(sum_scale=_ROOT), (), (80,)),
  },
  "NF-ResNet": {
    "as it is": ("nf_resnet", (28,), (16,)),
    "alpha = 5, no division": (
      dataclasses.replace(
        _nf_resnet, alpha=5.0, divide_by_expected_std=False, name="nf_resnet_five"
      ),
      (64,),
      (52,),
    ),
  },
  "MLP": {
    "unnormalized": ("unnormalized", (6, 10, 14, 24, 32, 60), (40,)),
    "divided by sqrt(2)": ("divide_by_sqrt2", (128,), (16,)),
    "batch norm, divided by sqrt(2)": ("batch_norm_divide_by_sqrt2", (160,), (100,)),
  },
  "Wide-ResNet": {
    "SkipInit": ("skipinit", (), (28,)),
    "unnormalized": ("unnormalized", (100,), ()),
  },
}
"""By family and variant: what makes it, and the depths that are tuned and judged."""


FRESH = {
  ("MLP", "unnormalized"): (4, 50),
  ("GPT", "pre-norm"): (16, 36),
  ("GPT", "pre-norm, divided by sqrt(2)"): (16,),
  ("GPT", "post-norm"): (4, 5, 8, 10, 14, 16, 18, 24, 30, 40, 50),
  ("ViT", "pre-norm"): (18, 32),
  ("ViT", "post-norm"): (3, 8, 10, 14, 18, 22, 28, 30, 36),
  ("ConvNeXt", "no LayerScale"): (20,),
}
"""The depths of the cells of the part "fresh"."""

LAST = {
  ("MLP", "unnormalized"): (8, 44),
  ("GPT", "pre-norm"): (20,),
  ("GPT", "post-norm"): (7, 35),
  ("ViT", "pre-norm"): (10,),
  ("ViT", "post-norm"): (9, 26),
  ("ConvNeXt", "no LayerScale"): (16,),
  ("U-Net", "group norm"): (9,),
  ("bottleneck", "no norm"): (6,),
}
"""The depths of the cells of the part "last"."""


class Cell(NamedTuple):
  """A network of the check.

  Attributes:
    part: "tuned", by which limits were set, "judged", "fresh", chosen when limits were
      set again, or "last", chosen when they were set for the last time.
    family: its family.
    variant: its form, in words.
    depth: its layers, or blocks.
  """

  part: str
  family: str
  variant: str
  depth: int


def cells() -> Iterator[Cell]:
  """Yields the cells of all parts."""
  for part, chosen in (("fresh", FRESH), ("last", LAST)):
    for (family, variant), depths in chosen.items():
      for depth in depths:
        yield Cell(part, family, variant, depth)
  for family, variants in VARIANTS.items():
    for variant, (_, tuned, judged) in variants.items():
      for part, depths in (("tuned", tuned), ("judged", judged)):
        for depth in depths:
          yield Cell(part, family, variant, depth)


def model_name(family: str, variant: str) -> str:
  """Returns the name of a variant in `skipinit_jax.models`."""
  return re.sub(r"[^a-z0-9.]+", "_", f"{family} {variant}".lower())


def _make(family: str, variant: str, depth: int, num_classes: int) -> nn.Module:
  made = VARIANTS[family][variant][0]
  if isinstance(made, Form):
    if made.scale == INVERSE_SQRT:
      branches = depth * (2 if family in ("GPT", "ViT") else 1)
      made = dataclasses.replace(made, scale=branches**-0.5)
    return Network(family, depth, made, num_classes)
  method = methods.get(made) if isinstance(made, str) else made
  if family == "MLP":
    return models.ResidualMLP(depth, 48, num_classes, method)
  return models.WideResNet(depth, 1, num_classes, method)


for _family, _variants in VARIANTS.items():
  for _variant in _variants:
    models.register(
      model_name(_family, _variant),
      functools.partial(_make, _family, _variant),
      title=f"{_family}, {_variant}",
    )
