"""Convolution whose gradients XLA:CPU computes fast, also inside a scan."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

_DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
_Pads = tuple[tuple[int, int], ...]


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
  feature_group_count: int = 1,
  precision: lax.PrecisionLike = None,
  preferred_element_type: jax.typing.DTypeLike | None = None,
  *,
  canonical_gradient: bool | None = None,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, with gradients that are canonical convolutions.

  JAX's own gradient of a convolution is a convolution over permuted dimensions.
  XLA:CPU runs those inside a loop (`flax.linen.scan` over depth) in a naive
  implementation, about 13 times slower than outside. Here both gradients are
  written as convolutions over NHWC images and HWIO kernels, which XLA:CPU
  recognizes everywhere. The canonical form gives up forward-mode differentiation;
  a block with `conv=flax.linen.Conv` keeps it.

  Convolutions that are not two-dimensional, dense and undilated over NHWC and
  HWIO always go to `jax.lax`.

  Args:
    lhs: images, [N, H, W, I].
    rhs: kernel, [h, w, I, O].
    window_strides: strides over H and W.
    padding: "SAME", "VALID" or ((low, high), (low, high)).
    lhs_dilation: as in `jax.lax`.
    rhs_dilation: as in `jax.lax`.
    dimension_numbers: as in `jax.lax`.
    feature_group_count: as in `jax.lax`.
    precision: as in `jax.lax`.
    preferred_element_type: as in `jax.lax`.
    canonical_gradient: whether to use the canonical gradients; None uses them
      where JAX's default backend is the CPU.

  Returns:
    The images' convolution with the kernel, [N, H', W', O].
  """
  if canonical_gradient is None:
    canonical_gradient = jax.default_backend() == "cpu"
  canonical_form = (
    lhs.ndim == 4
    and dimension_numbers is not None
    and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _DIMENSION_NUMBERS)
    and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    and feature_group_count == 1
    and preferred_element_type is None
  )
  if not (canonical_gradient and canonical_form):
    return lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      lhs_dilation=lhs_dilation,
      rhs_dilation=rhs_dilation,
      dimension_numbers=dimension_numbers,
      feature_group_count=feature_group_count,
      precision=precision,
      preferred_element_type=preferred_element_type,
    )
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(
      lhs.shape[1:3], rhs.shape[:2], window_strides, padding
    )
  (top, bottom), (left, right) = padding
  row_stride, column_stride = window_strides
  strides = int(row_stride), int(column_stride)
  pads = (int(top), int(bottom)), (int(left), int(right))
  if strides != (1, 1):
    lhs, rhs = _phases(lhs, rhs, strides, pads)
    pads = (0, 0), (0, 0)
  return _conv(lhs, rhs, pads, precision)


def _phases(
  images: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: _Pads
) -> tuple[jax.Array, jax.Array]:
  """Returns operands whose plain, unpadded convolution is the strided, padded one.

  Rows and columns that are congruent modulo the strides become features. Gradients of
  a strided convolution would be convolutions with zeros between the cotangent's
  elements, which canonical convolutions multiply like any other number.
  """
  none = (0, 0, 0)
  image_pads, kernel_pads, phases = [none], [], []
  for size, window, stride, (low, high) in zip(
    images.shape[1:3], kernel.shape[:2], strides, pads, strict=True
  ):
    # Windows look at no other phases than these.
    looked_at = min(window, stride)
    taps = -(-window // looked_at)
    extent = (size + low + high - window) // stride + taps
    phases.append(looked_at)
    image_pads.append((low, extent * stride - size - low, 0))
    kernel_pads.append((0, taps * looked_at - window, 0))
  zero = jnp.zeros((), images.dtype)
  images = lax.pad(images, zero, (*image_pads, none))
  kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), (*kernel_pads, none, none))
  # What follows is "space to depth", for each operand.
  num_images, height, _, features = images.shape
  images = images.reshape(
    num_images, height // strides[0], strides[0], -1, strides[1], features
  )[:, :, : phases[0], :, : phases[1]].transpose(0, 1, 3, 2, 4, 5)
  kernel_height, _, _, out_features = kernel.shape
  kernel = kernel.reshape(
    kernel_height // phases[0], phases[0], -1, phases[1], features, out_features
  ).transpose(0, 2, 1, 3, 4, 5)
  return (
    images.reshape(*images.shape[:3], -1),
    kernel.reshape(*kernel.shape[:2], -1, out_features),
  )


def _plain_conv(
  images: jax.Array, kernel: jax.Array, pads: _Pads, precision: lax.PrecisionLike
) -> jax.Array:
  if images.shape[1] < kernel.shape[0] or images.shape[2] < kernel.shape[1]:
    # XLA:CPU runs a window that is larger than the image naively, 14 times slower,
    # unless the padding comes first; the barrier keeps XLA from folding it back.
    padding = ((0, 0, 0), (*pads[0], 0), (*pads[1], 0), (0, 0, 0))
    images = lax.pad(images, jnp.zeros((), images.dtype), padding)
    images = lax.optimization_barrier(images)
    pads = ((0, 0), (0, 0))
  return lax.conv_general_dilated(
    images,
    kernel,
    (1, 1),
    pads,
    dimension_numbers=_DIMENSION_NUMBERS,
    precision=precision,
  )


_conv = jax.custom_vjp(_plain_conv, nondiff_argnums=(2, 3))


def _forward(
  images: jax.Array, kernel: jax.Array, pads: _Pads, precision: lax.PrecisionLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  images = _materialized(images)
  return _plain_conv(images, kernel, pads, precision), (images, kernel)


def _backward(
  pads: _Pads,
  precision: lax.PrecisionLike,
  residuals: tuple[jax.Array, jax.Array],
  cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  images, kernel = residuals
  sizes = tuple(
    zip(images.shape[1:3], kernel.shape[:2], cotangent.shape[1:3], pads, strict=True)
  )
  input_pads = tuple(
    (window - 1 - low, size - extent + low) for size, window, extent, (low, _) in sizes
  )
  kernel_pads = tuple(
    (low, window + extent - 1 - size - low) for size, window, extent, (low, _) in sizes
  )
  flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
  images_gradient = _plain_conv(cotangent, flipped, input_pads, precision)
  # Batch and features trade places on both operands: the batch is summed over.
  kernel_gradient = _plain_conv(
    images.transpose(3, 1, 2, 0),
    cotangent.transpose(1, 2, 0, 3),
    kernel_pads,
    precision,
  ).transpose(1, 2, 0, 3)
  return images_gradient, kernel_gradient


_conv.defvjp(_forward, _backward)


def _materialized(x: jax.Array) -> jax.Array:
  """Returns x, which XLA:CPU then computes once, however many read it.

  It would compute a cheap operation such as ReLU anew wherever its result is read, also
  inside the transposition for the kernel's gradient, which then takes much longer.
  Divisions are too expensive for it to do twice. The divisor is one, but only
  after the passes that simplify.
  """
  one = lax.optimization_barrier(jnp.ones((), x.dtype))
  return x / lax.clamp(one, x, one)


Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)
"""`flax.linen.Conv` on `conv_general_dilated` of this module."""
