"""The convolution's own gradients, against autodiff of `jax.lax`."""

import functools
import itertools
import os

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from skipinit_jax.layers import Conv, conv_general_dilated

NHWC = ("NHWC", "HWIO", "NHWC")


def normal(*shape):
  # NumPy's, because JAX would compile a generator for every shape.
  return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def arrays(size, kernel, batch=3, features=(2, 5)):
  return normal(batch, *size, features[0]), 2 * normal(*kernel, *features)


def convolve(images, kernel, strides=(1, 1), padding="SAME", canonical=True):
  convolution = conv_general_dilated if canonical else lax.conv_general_dilated
  return convolution(images, kernel, strides, padding, dimension_numbers=NHWC)


def value_and_gradients(images, kernel, strides, padding, canonical):
  output, vjp = jax.vjp(
    lambda *operands: convolve(*operands, strides, padding, canonical), images, kernel
  )
  # Any cotangent that tells positions, features and examples apart.
  cotangent = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
  return (output, *vjp(cotangent.astype(output.dtype)))


@functools.partial(jax.jit, static_argnums=(2, 3))
def both(images, kernel, strides, padding):
  def tangent(canonical):
    return jax.jvp(
      lambda *operands: convolve(*operands, strides, padding, canonical),
      (images, kernel),
      (jnp.cos(images), jnp.sin(kernel)),
    )[1]

  return [
    (
      *value_and_gradients(images, kernel, strides, padding, canonical),
      tangent(canonical),
    )
    for canonical in (True, False)
  ]


EVERY_KERNEL = [
  ((8, 7), kernel, strides, "SAME")
  for kernel, strides in itertools.product(
    [(1, 1), (3, 3), (7, 7), (3, 5)], [(1, 1), (2, 2), (3, 3)]
  )
]
OTHERS = [
  ((8, 8), (3, 3), (1, 2), "SAME"),
  ((7, 9), (2, 3), (3, 2), "SAME"),
  ((9, 9), (4, 4), (2, 2), "SAME"),
  ((8, 7), (3, 3), (2, 2), "VALID"),
  # A stride that leaves the last rows and columns unread.
  ((8, 9), (2, 3), (3, 5), "VALID"),
  ((7, 7), (7, 7), (1, 1), "VALID"),
  ((8, 6), (3, 3), (2, 2), "SAME_LOWER"),
  ((6, 7), (3, 3), (2, 1), ((0, 3), (2, 1))),
  # More padding than window, and a stride longer than the kernel.
  ((5, 5), (1, 1), (2, 3), ((1, 2), (2, 0))),
  # Images smaller than the window, in one direction or both, are padded first.
  ((2, 2), (3, 3), (1, 1), "SAME"),
  ((1, 1), (3, 3), (2, 2), "SAME"),
  ((2, 6), (3, 3), (2, 1), "SAME"),
  ((3, 2), (5, 7), (1, 2), ((3, 2), (4, 5))),
  # Negative padding crops.
  ((8, 8), (3, 3), (2, 2), ((-1, 0), (1, -2))),
  ((9, 6), (1, 1), (2, 2), ((-1, 2), (-2, -1))),
  # A phase's gradient crops on one side and pads on the other.
  ((9, 2), (3, 5), (3, 3), ((1, 1), (3, 3))),
  # Phases without a pixel or without a tap, and outputs that see padding only.
  ((1, 2), (2, 2), (3, 4), ((2, 3), (1, 4))),
  ((2, 1), (5, 3), (4, 2), ((4, 7), (5, 0))),
]


@pytest.mark.parametrize(
  ("size", "kernel", "strides", "padding"), EVERY_KERNEL + OTHERS
)
def test_gradients_and_tangents_equal_autodiff(size, kernel, strides, padding):
  actual, expected = both(*arrays(size, kernel), strides, padding)
  chex.assert_trees_all_equal_dtypes(actual, expected)
  chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  ("kernel", "strides"), [((3, 3), (1, 1)), ((3, 3), (2, 2)), ((7, 7), (2, 2))]
)
def test_bfloat16(kernel, strides):
  operands = [x.astype(jnp.bfloat16) for x in arrays((9, 8), kernel)]
  actual, _ = both(*operands, strides, "SAME")
  # Exact for these operands; a bfloat16 has eight significant bits.
  _, expected = both(*(x.astype(np.float32) for x in operands), strides, "SAME")
  for a, e in zip(actual, expected, strict=True):
    assert a.dtype == jnp.bfloat16
    error = np.abs(a.astype(jnp.float32) - e)
    assert error.max() < 2**-6 * np.abs(e).max()
    assert error.mean() < 2**-8 * np.abs(e).mean()


@pytest.mark.parametrize(
  ("size", "kernel", "strides"),
  [((6, 5), (3, 3), (1, 1)), ((7, 6), (3, 3), (2, 2)), ((6, 7), (3, 4), (2, 5))],
)
def test_float64_and_second_derivatives(size, kernel, strides):
  with jax.enable_x64(True):
    operands = tuple(x.astype(np.float64) for x in arrays(size, kernel))

    def derivatives(operands, canonical):
      def loss(operands):
        return jnp.sum(jnp.sin(convolve(*operands, strides, canonical=canonical)))

      gradients, forward = jax.jvp(jax.grad(loss), (operands,), (operands,))
      over_forward = jax.grad(lambda moving: jax.jvp(loss, (moving,), (operands,))[1])(
        operands
      )
      reverse = jax.grad(
        lambda operands: sum(jnp.sum(g**3) for g in jax.grad(loss)(operands))
      )(operands)
      return loss(operands), gradients, forward, over_forward, reverse

    actual, expected = jax.jit(
      lambda operands: [derivatives(operands, canonical) for canonical in (True, False)]
    )(operands)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
      assert a.dtype == np.float64
      np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-9 * np.abs(e).max())


@pytest.mark.parametrize(
  ("stride", "transform"), [(1, lambda body: body), (2, jax.checkpoint)]
)
def test_inside_a_scan(stride, transform):
  images, _ = arrays((6, 5), (3, 3), features=(4, 4))
  kernels = normal(3, 3, 3, 4, 4) / 6

  def loss(operands, canonical):
    def body(x, kernel):
      x = x.repeat(stride, 1).repeat(stride, 2)
      return nn.relu(convolve(x, kernel, (stride,) * 2, canonical=canonical)), None

    x, _ = lax.scan(transform(body), *operands)
    return jnp.sum(jnp.sin(x))

  @jax.jit
  def gradients(operands):
    return [jax.grad(loss)(operands, canonical) for canonical in (True, False)]

  chex.assert_trees_all_close(*gradients((images, kernels)), rtol=1e-4, atol=1e-5)


def test_cropping_one_side_and_padding_the_other():
  # lax cannot tell what is right: XLA:CPU gets its forward pass wrong, too.
  images, kernel = arrays((6, 3), (4, 2))
  actual = jax.jit(convolve, static_argnums=(2, 3))(
    images, kernel, (1, 1), ((-2, 1), (0, 0))
  )
  padded = np.pad(images[:, 2:], ((0, 0), (0, 1), (0, 0), (0, 0)))
  np.testing.assert_allclose(
    actual, convolve(padded, kernel, padding="VALID"), rtol=1e-4, atol=1e-5
  )


def test_numbers_that_are_not_finite_pass():
  images, kernel = arrays((6, 5), (1, 1), features=(1, 1))
  images[0, 0, :4, 0] = np.inf, -np.inf, np.nan, -0.0
  actual, _ = jax.jit(jax.vjp, static_argnums=0)(convolve, images, kernel)
  np.testing.assert_allclose(actual, images * kernel, rtol=1e-6)


@pytest.mark.parametrize("jacobian", [jax.jacfwd, jax.jacrev])
def test_jacobians(jacobian):
  operands = arrays((5, 4), (3, 3), batch=1)
  actual, expected = jax.jit(
    lambda *operands: [
      jacobian(lambda *x, own=own: convolve(*x, (2, 2), canonical=own), (0, 1))(
        *operands
      )
      for own in (True, False)
    ]
  )(*operands)
  chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_batch_sharded_over_devices():
  images, kernel = arrays((6, 6), (3, 3), batch=8)
  _, expected = both(images, kernel, (2, 2), "SAME")
  mesh = jax.make_mesh(
    (4,),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:4],
  )
  named = jax.sharding.NamedSharding
  images = jax.device_put(images, named(mesh, jax.P("data")))
  kernel = jax.device_put(kernel, named(mesh, jax.P()))
  actual, _ = both(images, kernel, (2, 2), "SAME")
  assert actual[0].sharding.spec[0] == "data"
  chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)


def convolutions(platform, canonical, strides, kernel=(3, 3)):
  """Each convolution's dimensions and dilation, as a platform's compiler gets them."""
  traced = jax.jit(value_and_gradients, static_argnums=(2, 3, 4)).trace(
    *arrays((8, 8), kernel), strides, "SAME", canonical
  )
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
  return [line[line.index("dim_numbers") : line.index(" : ")] for line in lines]


# A convolution forward, one for each phase of the images, one for the kernel.
@pytest.mark.parametrize(
  ("strides", "count"), [((1, 1), 3), ((2, 2), 6), ((2, 3), 8), ((4, 1), 5)]
)
def test_every_convolution_for_cpus_is_canonical(strides, count):
  # What XLA:CPU needs to find its fast kernels inside a loop.
  def is_canonical(line):
    plain = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    return plain in line and "lhs_dilate" not in line.replace("lhs_dilate = [1, 1]", "")

  assert [is_canonical(line) for line in convolutions("cpu", True, strides)] == (
    [True] * count
  )
  # The test sees the difference.
  assert not all(map(is_canonical, convolutions("cpu", False, strides)))


def test_a_cpu_cuts_out_what_strides_reach():
  assert not any("[2, 2]" in each for each in convolutions("cpu", True, (2, 2), (1, 1)))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_other_platforms_get_the_gradient_of_jax(platform, kernel):
  own, jax_own = (
    convolutions(platform, each, (2, 2), kernel) for each in (True, False)
  )
  # The forward convolution stands beside the gradient once more, and nobody reads it.
  assert set(own) == set(jax_own)
  assert len(jax_own) == 3


@pytest.mark.parametrize(
  ("lhs_shape", "rhs_shape", "options"),
  [
    ((2, 8, 8, 4), (3, 3, 4, 4), {"rhs_dilation": (2, 1)}),
    ((2, 8, 8, 4), (3, 3, 4, 4), {"lhs_dilation": (1, 2)}),
    ((2, 8, 8, 4), (3, 3, 2, 4), {"feature_group_count": 2}),
    ((2, 8, 8, 4), (3, 3, 4, 4), {"preferred_element_type": jnp.float32}),
    ((2, 8, 4), (3, 4, 4), {"dimension_numbers": ("NHC", "HIO", "NHC")}),
    (
      (2, 5, 5, 5, 4),
      (3, 3, 3, 4, 4),
      {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")},
    ),
    ((2, 4, 8, 8), (4, 4, 3, 3), {"dimension_numbers": None}),
    ((2, 4, 8, 8), (4, 4, 3, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
  ],
)
def test_other_convolutions_go_to_lax(lhs_shape, rhs_shape, options):
  dimensions = len(lhs_shape) - 2

  def jaxpr(convolution):
    return jax.make_jaxpr(
      lambda lhs, rhs: convolution(
        lhs,
        rhs,
        (1,) * dimensions,
        # lax resolves no names of paddings for transposed convolutions.
        [(1, 1)] * dimensions,
        **({"dimension_numbers": NHWC} | options),
      )
    )(np.ones(lhs_shape), np.ones(rhs_shape))

  assert str(jaxpr(conv_general_dilated)) == str(jaxpr(lax.conv_general_dilated))


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"strides": 2, "use_bias": False},
    {"padding": "VALID", "dtype": jnp.bfloat16},
    {"padding": "CIRCULAR", "strides": (2, 1)},
    {"padding": 2, "precision": "highest"},
    {"kernel_dilation": 2},
    {"feature_group_count": 2},
  ],
)
def test_module_equals_flax(fields):
  images, _ = arrays((8, 7), (3, 3), features=(4, 4))

  own, flax = (conv(6, (3, 3), **fields) for conv in (Conv, nn.Conv))
  shapes = jax.eval_shape(flax.init, jax.random.key(0), images)
  assert jax.eval_shape(own.init, jax.random.key(0), images) == shapes

  @jax.jit
  def run(variables):
    def loss(variables, module):
      y = module.apply(variables, images)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    return [jax.grad(loss, has_aux=True)(variables, module) for module in (own, flax)]

  # bfloat16 kernels may round differently; see test_bfloat16 for the exact bound.
  tolerance = 0.1 if fields.get("dtype") == jnp.bfloat16 else 1e-4
  gradients = run(jax.tree.map(lambda leaf: normal(*leaf.shape), shapes))
  chex.assert_trees_all_close(*gradients, rtol=tolerance, atol=tolerance)


def test_small_image_is_padded_before_its_convolution():
  # Unless XLA sees the padding done, it runs such a convolution naively.
  operands = arrays((2, 2), (3, 3))
  # As users have it, where tests compile without.
  name = "xla_cpu_use_fusion_emitters"
  options = {name: True} if name in os.environ.get("XLA_FLAGS", "") else None
  lowered = jax.jit(lambda *x: convolve(*x)).lower(*operands)
  text = lowered.compile(options).as_text()
  line = next(line for line in text.splitlines() if " convolution(" in line)
  assert "window={size=3x3}" in line
