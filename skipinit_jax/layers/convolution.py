"""Convolution whose gradients XLA:CPU computes fast, also inside a scan."""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import NamedSharding, PartitionSpec

_DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
_NO_PADS = ((0, 0), (0, 0))


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
  **options: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, with gradients that CPUs compute fast.

  JAX's own gradient of a convolution is a convolution over permuted dimensions.
  XLA:CPU runs those inside a loop (`flax.linen.scan` over depth) in a naive
  implementation, about 13 times slower than outside. Where a program is compiled for a
  CPU, the derivative is therefore a convolution over permuted dimensions, whose own
  transposition, the gradient, is one over NHWC images and HWIO kernels, which XLA:CPU
  recognizes everywhere. Forward-mode derivatives are slow in its place. On other
  platforms both are JAX's own. As all of it is made of JAX's operations, it is
  differentiated, batched and sharded as they are.

  Convolutions that are not two-dimensional, dense and undilated over NHWC and
  HWIO always go to `jax.lax`, and so do those with an `out_sharding`. Arguments that
  are not listed are as there.

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
    and all(option is None for option in options.values())
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
      **options,
    )
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(
      lhs.shape[1:3], rhs.shape[:2], window_strides, padding
    )
  strides = tuple(map(int, window_strides))
  pads = tuple((int(low), int(high)) for low, high in padding)
  return _conv(lhs, rhs, _Window(strides, pads, precision))


class _Window(NamedTuple):
  """How a convolution's window moves, and how precisely it multiplies."""

  strides: tuple[int, ...]
  pads: tuple[tuple[int, int], ...]
  precision: lax.PrecisionLike


def _by_platform(
  cpu_conv: Callable[..., jax.Array],
  window: _Window,
  images: jax.Array,
  kernel: jax.Array,
) -> jax.Array:
  # The platform is known when the program is compiled, not while it is traced.
  return lax.platform_dependent(
    images,
    kernel,
    cpu=functools.partial(cpu_conv, window),
    default=functools.partial(_lax_conv, window),
  )


# Transposes its operands in the backward pass, which otherwise keeps them so.
_linear = jax.checkpoint(_by_platform, prevent_cse=False, static_argnums=(0, 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _conv(images: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
  return _by_platform(_cpu_conv, window, images, kernel)


@functools.partial(_conv.defjvp, symbolic_zeros=True)
def _derivative(
  window: _Window, primals: tuple[jax.Array, jax.Array], tangents: tuple[Any, Any]
) -> tuple[jax.Array, jax.Array]:
  images, kernel = primals
  if not _passes_over(window, kernel):
    images = lax.platform_dependent(images, cpu=_materialized, default=lambda x: x)
  output = _conv(images, kernel, window)
  tangent = jnp.zeros_like(output)
  by_images, by_kernel = tangents
  if not isinstance(by_images, SymbolicZero):
    tangent += _linear(_cpu_conv_of_images, window, by_images, kernel)
  if not isinstance(by_kernel, SymbolicZero):
    tangent += _linear(_cpu_conv_of_kernel, window, images, by_kernel)
  return output, tangent


def _lax_conv(window: _Window, images: jax.Array, kernel: jax.Array) -> jax.Array:
  return lax.conv_general_dilated(
    images,
    kernel,
    window.strides,
    window.pads,
    dimension_numbers=_DIMENSION_NUMBERS,
    precision=window.precision,
  )


def _cpu_conv(window: _Window, images: jax.Array, kernel: jax.Array) -> jax.Array:
  images, window = _reached(window, images, kernel)
  if _must_pad_first(images.shape[1:3], kernel.shape[:2], window.pads):
    images = lax.optimization_barrier(_padded(images, window.pads))
    window = window._replace(pads=_NO_PADS)
  return _lax_conv(window, images, kernel)


def _cpu_conv_of_images(
  window: _Window, images: jax.Array, kernel: jax.Array
) -> jax.Array:
  """The convolution, whose transposition for the images is in canonical form."""
  # As one convolution, the images' gradient would need zeros between the cotangent's
  # elements, which are multiplied like any other number. But pixels that are congruent
  # modulo the strides, a phase of the images, meet only every stride-th of the
  # kernel's taps: each phase's gradient is a convolution with those, without zeros.
  images, window = _reached(window, images, kernel)
  extents = _extents(window, images, kernel)
  outputs = []
  for first_taps in itertools.product(
    *map(range, map(min, kernel.shape[:2], window.strides))
  ):
    rows, columns = (
      slice(first, None, stride)
      for first, stride in zip(first_taps, window.strides, strict=True)
    )
    part = kernel[rows, columns]
    places, pads, transposed_pads = [], [], []
    for tap, taps, size, extent, stride, (low, _) in zip(
      first_taps,
      part.shape[:2],
      images.shape[1:3],
      extents,
      window.strides,
      window.pads,
      strict=True,
    ):
      # The first output meets this tap in the phase's pixel `first`; the phase begins
      # at the images' pixel `start`, and may end beyond them.
      first, start = divmod(tap - low, stride)
      length = -(-size // stride)
      places.append((-start, start + (length - 1) * stride + 1 - size))
      pads.append((-first, extent + taps - 1 + first - length))
      transposed_pads.append((taps - 1 + first, length - extent - first))
    phase = _every(_padded(images, places), window.strides)
    crops = None
    if min(map(min, pads)) < 0 or _must_pad_first(
      extents, part.shape[:2], transposed_pads
    ):
      crops = [(-low, -high) for low, high in transposed_pads]
      pads = [(taps - 1, taps - 1) for taps in part.shape[:2]]
    output = lax.conv_general_dilated(
      phase,
      part.swapaxes(2, 3),
      (1, 1),
      pads,
      dimension_numbers=("NHWC", "HWOI", "NHWC"),
      precision=window.precision,
    )
    if crops is not None:
      output = _padded(lax.optimization_barrier(output), crops)
    outputs.append(output)
  return functools.reduce(jnp.add, outputs)


def _cpu_conv_of_kernel(
  window: _Window, images: jax.Array, kernel: jax.Array
) -> jax.Array:
  """The convolution, whose transposition for the kernel is in canonical form."""
  if _passes_over(window, kernel):
    images, window = _reached(window, images, kernel)
    images = _materialized(images)
  extents = _extents(window, images, kernel)
  # Without the pixels that no window reaches.
  pads = tuple(
    (low, taps + (extent - 1) * stride - size - low)
    for size, taps, extent, stride, (low, _) in zip(
      images.shape[1:3],
      kernel.shape[:2],
      extents,
      window.strides,
      window.pads,
      strict=True,
    )
  )
  # In the transposition the cotangent is the window, and its elements lie apart.
  taps = [
    (extent - 1) * stride + 1
    for extent, stride in zip(extents, window.strides, strict=True)
  ]
  if _must_pad_first(images.shape[1:3], taps, pads):
    images, pads = lax.optimization_barrier(_padded(images, pads)), _NO_PADS
  # Batch and features have traded places, because transposition has them trade once
  # more: it sums over the batch.
  sharding = jax.typeof(images).sharding
  batch, height, width, _ = sharding.spec
  options: dict[str, Any] = {}
  if any((batch, height, width)):
    # An explicit mesh wants to know where the batch goes.
    spec = PartitionSpec(height, width, batch, None)
    options["out_sharding"] = NamedSharding(sharding.mesh, spec)
  return lax.conv_general_dilated(
    images.transpose(3, 1, 2, 0),
    kernel.transpose(2, 0, 1, 3),
    window.strides,
    pads,
    dimension_numbers=("CHWN", "IHWO", "HWNC"),
    precision=window.precision,
    **options,
  ).transpose(2, 0, 1, 3)


def _passes_over(window: _Window, kernel: jax.Array) -> bool:
  """Tells whether the strides of a 1x1 kernel pass over pixels."""
  return kernel.shape[:2] == (1, 1) and window.strides != (1, 1)


def _reached(
  window: _Window, images: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, _Window]:
  """Leaves out the pixels that the window passes over: gradients do not touch them.

  A TPU skips them as it reads; an array of the others would have to be written there.
  """
  if not _passes_over(window, kernel):
    return images, window
  reached = _every(_padded(images, window.pads), window.strides)
  return reached, window._replace(strides=(1, 1), pads=_NO_PADS)


def _extents(window: _Window, images: jax.Array, kernel: jax.Array) -> tuple[int, ...]:
  """Returns height and width of the convolution's output."""
  return tuple(
    (size + low + high - taps) // stride + 1
    for size, taps, stride, (low, high) in zip(
      images.shape[1:3], kernel.shape[:2], window.strides, window.pads, strict=True
    )
  )


def _must_pad_first(
  sizes: Sequence[int], taps: Sequence[int], pads: Sequence[tuple[int, int]]
) -> bool:
  """Tells whether XLA:CPU must not see a convolution's padding.

  It gets convolutions wrong that crop one side and pad the other, and runs a window
  that is larger than the image naively, 14 times slower. Neither happens if the padding
  comes first; a barrier keeps XLA from folding it back.
  """
  return min(map(min, pads)) < 0 or any(map(operator.lt, sizes, taps))


def _padded(images: jax.Array, pads: Sequence[tuple[int, int]]) -> jax.Array:
  """Returns the images with zeros around them."""
  rows, columns = ((low, high, 0) for low, high in pads)
  none = (0, 0, 0)
  return lax.pad(images, jnp.zeros((), images.dtype), (none, rows, columns, none))


def _every(images: jax.Array, strides: tuple[int, ...]) -> jax.Array:
  """Returns the images' pixels strides apart."""
  return lax.slice(images, (0,) * 4, images.shape, (1, *strides, 1))


@jax.custom_jvp
def _materialized(x: jax.Array) -> jax.Array:
  """Returns x, which XLA:CPU then computes once, however many read it.

  It would compute a cheap operation such as ReLU anew wherever its result is read, also
  inside the transposition for the kernel's gradient, which then takes much longer.
  Divisions are too expensive for it to do twice. The divisor is one, but only
  after the passes that simplify.
  """
  one = lax.optimization_barrier(jnp.ones((), x.dtype))
  return x / lax.clamp(one, x, one)


_materialized.defjvps(lambda tangent, *_: tangent)


Conv = functools.partial(nn.Conv, conv_general_dilated=conv_general_dilated)
"""`flax.linen.Conv` on `conv_general_dilated` of this module."""
