"""Vision Transformers whose attention and MLP branches take any normalizer or none."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.errors import UsageError, require_positive
from skipinit_jax.fields import check_types
from skipinit_jax.layers import he_normal
from skipinit_jax.methods import Activation, Method, ModuleFactory, bind_normalizer
from skipinit_jax.models.blocks import ResidualBlock
from skipinit_jax.models.depth import DepthStack, Stacked
from skipinit_jax.models.head import Head
from skipinit_jax.models.stochastic_depth import branch_drops

Initializer = jax.nn.initializers.Initializer
# Variance 1 / fan-in keeps the signal in layers that follow no ReLU.
_lecun_normal: Initializer = nn.initializers.lecun_normal()


class AttentionBlock(ResidualBlock):
  """Residual block of multi-head self-attention (Vaswani et al., NeurIPS 2017).

  The normalizer stands before the attention.

  Attributes:
    features: the features of a token, which stay.
    num_heads: heads, which must divide the features.
    kernel_init: initializer of the layers; the default has variance 1 / fan-in.
    last_kernel_init: initializer of the last layer; None: `kernel_init`.
  """

  features: int
  num_heads: int = 1
  kernel_init: Initializer = _lecun_normal
  last_kernel_init: Initializer | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps tokens [N, T, features] to [N, T, features].

    Raises:
      UsageError: the input has other features.
    """
    self.require_features(x, self.features)
    return self.merge(x, self.scale(self.layer(x), self.normalize(x, "norm1")))

  @nn.nowrap
  def layer(self, x: jax.Array) -> Any:
    """Returns the attention, which computes as the block's input x allows."""
    return nn.MultiHeadDotProductAttention(
      self.num_heads,
      use_bias=self.use_bias,
      kernel_init=self.kernel_init,
      out_kernel_init=self.last_kernel_init,
      # Weights of many tokens have to sum to one.
      force_fp32_for_softmax=jnp.promote_types(self.dtype or x.dtype, jnp.float32)
      == jnp.float32,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="attention",
    )


class MLPBlock(ResidualBlock):
  """Residual block of two dense layers applied to each token.

  Vaswani et al. (NeurIPS 2017): the hidden layer has four times the features. The
  normalizer stands before the first layer.

  Attributes:
    features: the features of a token, which stay.
    activation: the activation function between the layers.
    kernel_init: initializer of the first layer; the default has variance 1 / fan-in.
    last_kernel_init: initializer of the second layer, which follows the activation.
  """

  features: int
  activation: Activation = nn.relu
  kernel_init: Initializer = _lecun_normal
  last_kernel_init: Initializer = he_normal

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps tokens [N, T, features] to [N, T, features].

    Raises:
      UsageError: the input has other features.
    """
    self.require_features(x, self.features)
    y = self.layer(1)(self.normalize(x, "norm1"))
    return self.merge(x, self.scale(self.layer(2), self.activation(y)))

  @nn.nowrap
  def layer(self, index: int) -> Any:
    """Returns one of the two layers, counted from 1."""
    features, init = self.features, self.last_kernel_init
    if index == 1:
      features, init = 4 * features, self.kernel_init
    return self._layer(nn.Dense, features, init, f"dense{index}")


class EncoderBlock(nn.Module):
  """A layer of a Transformer's encoder: two residual blocks, one after the other.

  Attributes:
    attention: factory of the first, such as a `functools.partial` of `AttentionBlock`.
    mlp: factory of the second, such as a `functools.partial` of `MLPBlock`.
  """

  attention: ModuleFactory
  mlp: ModuleFactory

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps tokens [N, T, features] to [N, T, features]."""
    x = self.attention(name="attention")(x)
    return self.mlp(name="mlp")(x)


class VisionTransformer(Stacked):
  """Transformer encoder on the patches of images (Dosovitskiy et al., ICLR 2021).

  Each patch becomes a token by one linear layer, to which a learned embedding of its
  position is added. The classifier sees the mean of the last layer's tokens, which are
  normalized if the method normalizes. With the method "layer_norm" this is the usual
  pre-norm network, but for the activation, a ReLU, and the biases, which are the
  method's choice.

  Each encoder layer has two residual branches, so an alpha that depends on depth is
  that of 2 depth blocks.

  Attributes:
    depth: number of encoder layers.
    width: features of a token.
    num_classes: number of logits.
    method: what keeps the network trainable, or its name; see `skipinit_jax.methods`.
      Fixup and weight standardization are defined for layers one after the other, and
      attention is not that.
    patch_size: height and width of a patch in pixels; it must divide the images'.
    num_heads: attention heads; they must divide the width.
    scan: whether to scan over the encoder layers, or to write them out.
    remat: whether to recompute layers in the backward pass to save memory.
    dtype: dtype of the computation.
    param_dtype: dtype of the parameters.

  Raises:
    UsageError: a size is below 1 or does not divide, or the method is not defined
      for attention.
  """

  depth: int
  width: int
  num_classes: int
  method: Method | str
  patch_size: int = 2
  num_heads: int = 4
  scan: bool = True
  remat: bool = False
  dtype: jax.typing.DTypeLike = jnp.float32
  param_dtype: jax.typing.DTypeLike = jnp.float32

  def __post_init__(self) -> None:
    self.method = methods.get(self.method)
    super().__post_init__()
    check_types(self)
    require_positive(
      depth=self.depth,
      width=self.width,
      num_classes=self.num_classes,
      patch_size=self.patch_size,
      num_heads=self.num_heads,
    )
    if self.width % self.num_heads:
      raise UsageError(
        f"width is {self.width}: it is not a multiple of num_heads, which is "
        f"{self.num_heads}."
      )
    methods.get(self.method).require_default(
      "conv",
      "dense",
      "kernel_init",
      "branch_init",
      "last_init",
      "scalar_biases",
      "divide_by_expected_std",
      network="a VisionTransformer",
    )

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [N, H, W, C] to logits [N, num_classes], float32."""
    dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    method = methods.get(self.method)
    fields = method.block_fields(num_blocks=2 * self.depth, train=train, **dtypes)
    x = nn.Dense(
      self.width,
      use_bias=method.stem_bias,
      kernel_init=_lecun_normal,
      **dtypes,
      name="stem",
    )(self._patches(images))
    positions = self.param(
      "position_embedding",
      nn.initializers.normal(0.02),
      x.shape[1:],
      self.param_dtype,
    )
    x += positions.astype(x.dtype)[None]
    block = functools.partial(
      EncoderBlock,
      functools.partial(AttentionBlock, self.width, num_heads=self.num_heads, **fields),
      functools.partial(MLPBlock, self.width, activation=method.activation, **fields),
    )
    (drops,) = branch_drops(self, method.drop_path, [self.depth], train=train)
    stack = DepthStack(block, self.depth, self.scan, self.remat, name="stack")
    x = stack(x, drops=drops)
    norm = bind_normalizer(method.normalizer, train=train, **dtypes)
    x = x if norm is None else norm(name="norm")(x)
    return Head(self.num_classes, method, preactivation=False, **dtypes, name="head")(
      x, train
    )

  def _patches(self, images: jax.Array) -> jax.Array:
    """Cuts images [N, H, W, C] into patches, [N, T, patch_size^2 C], row by row."""
    batch, height, width, channels = images.shape
    size = self.patch_size
    if height % size or width % size:
      raise UsageError(
        f"patch_size is {size}: it does not divide images of {height}x{width} pixels."
      )
    rows, columns = height // size, width // size
    # One split or merge at a time: more at once are an error on an explicit mesh.
    x = images.reshape(batch, rows, size, width, channels)
    x = x.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
    # Counts are written out: the batch of an exported network has no number.
    x = x.reshape(batch, rows * columns, size, size, channels)
    return x.reshape(batch, rows * columns, size * size * channels)
