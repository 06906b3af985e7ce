"""Convolution whose gradients XLA:CPU computes fast, also inside a scan."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

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
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, with gradients that CPUs compute fast.

  JAX's own gradient of a convolution is a convolution over permuted dimensions.
  XLA:CPU runs those inside a loop (`flax.linen.scan` over depth) in a naive
  implementation, about 13 times slower than outside. Where a program is compiled for a
  CPU, both gradients are therefore written as convolutions over NHWC images and HWIO
  kernels, which XLA:CPU recognizes everywhere; on other platforms they are JAX's own.
  This gives up forward-mode differentiation; a block with `conv=flax.linen.Conv` keeps
  it.

  Convolutions that are not two-dimensional, dense and undilated over NHWC and
  HWIO always go to `jax.lax`. Arguments that are not listed are as there.

  Args:
    lhs: images, [N, H, W, I].
    rhs: kernel, [h, w, I, O].
    window_strides: strides over H and W.
    padding: "SAME", "VALID" or ((low, high), (low, high)).

  Returns:
    The images' convolution with the kernel, [N, H', W', O].
  """
  canonical_form = (
    lhs.ndim == 4
    and dimension_numbers is not None
    and lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _DIMENSION_NUMBERS)
    and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    and feature_group_count == 1
    and preferred_element_type is None
  )
  if not canonical_form:
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
  if rhs.shape[:2] == (1, 1) and strides != (1, 1):
    # So that the gradients never touch the pixels that the strides pass over.
    lhs = _padded(lhs, pads)[:, :: strides[0], :: strides[1]]
    strides, pads = (1, 1), ((0, 0), (0, 0))
  return _conv(lhs, rhs, _Window(strides, pads, precision))


class _Window(NamedTuple):
  """How a convolution's window moves, and how precisely it multiplies."""

  strides: tuple[int, int]
  pads: _Pads
  precision: lax.PrecisionLike


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(images: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
  return _conv_by_platform(images, kernel, window)


def _conv_by_platform(
  images: jax.Array, kernel: jax.Array, window: _Window
) -> jax.Array:
  # The platform is known when the program is compiled, not while it is traced.
  return lax.platform_dependent(
    images,
    kernel,
    cpu=functools.partial(_cpu_conv, window),
    default=functools.partial(_lax_conv, window),
  )


def _forward(
  images: jax.Array, kernel: jax.Array, window: _Window
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  images = lax.platform_dependent(images, cpu=_materialized, default=lambda x: x)
  return _conv_by_platform(images, kernel, window), (images, kernel)


def _backward(
  window: _Window, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  gradients: tuple[jax.Array, jax.Array] = lax.platform_dependent(
    *residuals,
    cotangent,
    cpu=functools.partial(_cpu_backward, window),
    default=functools.partial(_lax_backward, window),
  )
  return gradients


_conv.defvjp(_forward, _backward)


def _lax_conv(window: _Window, images: jax.Array, kernel: jax.Array) -> jax.Array:
  return lax.conv_general_dilated(
    images,
    kernel,
    window.strides,
    window.pads,
    dimension_numbers=_DIMENSION_NUMBERS,
    precision=window.precision,
  )


def _lax_backward(
  window: _Window, images: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  _, transpose = jax.vjp(functools.partial(_lax_conv, window), images, kernel)
  images_gradient, kernel_gradient = transpose(cotangent)
  return images_gradient, kernel_gradient


def _cpu_conv(window: _Window, images: jax.Array, kernel: jax.Array) -> jax.Array:
  return _plain_conv(images, kernel, *window)


def _cpu_backward(
  window: _Window, images: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
  strides, pads, precision = window
  axes = list(
    zip(
      images.shape[1:3],
      kernel.shape[:2],
      cotangent.shape[1:3],
      strides,
      pads,
      strict=True,
    )
  )
  # As one convolution, the images' gradient would need zeros between the cotangent's
  # elements, which are multiplied like any other number. But pixels that are congruent
  # modulo the strides, a phase of the images, meet only every stride-th of the
  # kernel's taps: each phase's gradient is a convolution with those, without zeros.
  phases = []
  for first_taps in itertools.product(
    *(range(min(taps, stride)) for _, taps, _, stride, _ in axes)
  ):
    part = kernel[first_taps[0] :: strides[0], first_taps[1] :: strides[1]]
    phase_pads, places = [], []
    for tap, taps, (size, _, extent, stride, (low, _)) in zip(
      first_taps, part.shape[:2], axes, strict=True
    ):
      # The first output meets this tap in the phase's pixel `first`; the phase begins
      # at the images' pixel `start`.
      first, start = divmod(tap - low, stride)
      length = -(-size // stride)
      phase_pads.append((taps - 1 + first, length - extent - first))
      # Where the phase ends beyond the images, this is negative, and crops.
      places.append((start, size - start - (length - 1) * stride - 1))
    flipped = jnp.flip(part, (0, 1)).swapaxes(2, 3)
    phase = _plain_conv(cotangent, flipped, (1, 1), tuple(phase_pads), precision)
    phases.append(_padded(phase, places, strides))
  images_gradient = functools.reduce(jnp.add, phases)
  # Batch and features trade places on both operands: the batch is summed over.
  kernel_pads = tuple(
    (low, taps + (extent - 1) * stride - size - low)
    for size, taps, extent, stride, (low, _) in axes
  )
  kernel_gradient = _plain_conv(
    images.transpose(3, 1, 2, 0),
    cotangent.transpose(1, 2, 0, 3),
    (1, 1),
    kernel_pads,
    precision,
    kernel_dilation=strides,
  ).transpose(1, 2, 0, 3)
  return images_gradient, kernel_gradient


def _plain_conv(
  images: jax.Array,
  kernel: jax.Array,
  strides: tuple[int, int],
  pads: _Pads,
  precision: lax.PrecisionLike,
  kernel_dilation: tuple[int, int] = (1, 1),
) -> jax.Array:
  crops = min(map(min, pads)) < 0
  beyond = any(
    size <= (taps - 1) * dilation
    for size, taps, dilation in zip(
      images.shape[1:3], kernel.shape[:2], kernel_dilation, strict=True
    )
  )
  if crops or beyond:
    # XLA:CPU gets convolutions wrong that crop one side and pad the other, and runs a
    # window that is larger than the image naively, 14 times slower. Neither happens if
    # the padding comes first; the barrier keeps XLA from folding it back.
    images = lax.optimization_barrier(_padded(images, pads))
    pads = ((0, 0), (0, 0))
  return lax.conv_general_dilated(
    images,
    kernel,
    strides,
    pads,
    rhs_dilation=kernel_dilation,
    dimension_numbers=_DIMENSION_NUMBERS,
    precision=precision,
  )


def _padded(
  images: jax.Array, pads: Sequence[tuple[int, int]], strides: tuple[int, int] = (1, 1)
) -> jax.Array:
  """Returns the images with zeros around them, and their pixels strides apart."""
  rows, columns = (
    (low, high, stride - 1) for (low, high), stride in zip(pads, strides, strict=True)
  )
  none = (0, 0, 0)
  zero = jnp.zeros((), images.dtype)
  return lax.pad(images, zero, (none, rows, columns, none))


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
