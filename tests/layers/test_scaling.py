"""SkipInit's multiplier, LayerScale and Fixup's bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.layers import LayerScale, ScalarBias, SkipInit


@pytest.fixture(scope="module")
def branch():
  return jax.random.normal(jax.random.key(0), (4, 5, 3))


# SkipInit learns one factor, LayerScale one for each channel.
SCALES = pytest.mark.parametrize(
  ("module", "name", "factors"),
  [(SkipInit, "alpha", np.float32(-3)), (LayerScale, "scale", np.float32([2, -1, 0]))],
)


@SCALES
def test_a_scale_is_a_parameter_unless_it_is_fixed(branch, module, name, factors):
  variables = module(0.25).init(jax.random.key(0), branch)
  assert jax.tree.map(jnp.shape, variables) == {"params": {name: factors.shape}}
  np.testing.assert_array_equal(variables["params"][name], 0.25)
  output = module(0.25).apply({"params": {name: factors}}, branch)
  np.testing.assert_allclose(output, factors * branch, rtol=1e-6)
  constant = module(0.5, learnable=False)
  assert not jax.tree.leaves(constant.init(jax.random.key(0), branch))
  np.testing.assert_allclose(constant.apply({}, branch), 0.5 * branch, rtol=1e-6)


def test_a_constant_factor_beside_alpha(branch):
  module = SkipInit(0.25, factor=0.2)
  variables = module.init(jax.random.key(0), branch)
  np.testing.assert_array_equal(variables["params"]["alpha"], 0.25)
  np.testing.assert_allclose(module.apply(variables, branch), 0.05 * branch, rtol=1e-6)


@pytest.mark.parametrize("module", [SkipInit, LayerScale])
def test_constants_are_exact_in_float64(module):
  with jax.enable_x64(True):
    output = module(0.1, learnable=False).apply({}, jnp.ones((2, 3)))
    # 0.1 in float32 is 1.5e-9 more.
    np.testing.assert_array_equal(output, 0.1)


@SCALES
@pytest.mark.parametrize("at", [0.0, 0.5])
def test_gradients(branch, module, name, factors, at):
  cotangent = jax.random.normal(jax.random.key(1), branch.shape)
  _, vjp = jax.vjp(module().apply, {"params": {name: at * factors}}, branch)
  gradient, branch_gradient = vjp(cotangent)
  # At 0 the branch gets no gradient, but its factor does: it is how training starts.
  products = np.asarray(branch, np.float64) * np.asarray(cotangent)
  expected = products.sum((0, 1)) if factors.ndim else products.sum()
  np.testing.assert_allclose(gradient["params"][name], expected, rtol=1e-4)
  np.testing.assert_allclose(branch_gradient, cotangent * at * factors, rtol=1e-5)


def test_scalar_bias(branch):
  variables = ScalarBias().init(jax.random.key(0), branch)
  assert jax.tree.map(jnp.shape, variables) == {"params": {"bias": ()}}
  np.testing.assert_array_equal(ScalarBias().apply(variables, branch), branch)
  output = ScalarBias().apply({"params": {"bias": jnp.float32(0.5)}}, branch)
  np.testing.assert_allclose(output, branch + 0.5, rtol=1e-6)


@pytest.mark.parametrize("module", [SkipInit(1.0), ScalarBias()])
def test_bfloat16_keeps_the_dtype_and_sums_the_gradient_in_float32(module):
  # Ones, 2^16 times: a sum in bfloat16 stops at 256.
  x = jnp.ones((64, 1024), jnp.bfloat16)
  variables = module.init(jax.random.key(0), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
  output, vjp = jax.vjp(lambda variables: module.apply(variables, x), variables)
  assert output.dtype == jnp.bfloat16
  (gradient,) = vjp(jnp.ones_like(output))
  assert jax.tree.leaves(gradient) == [2.0**16]


def test_bfloat16_backward_pass_keeps_no_float32_copy_of_the_branch():
  x = jnp.ones((8, 128), jnp.bfloat16)
  variables = SkipInit(1.0).init(jax.random.key(0), x)
  _, vjp = jax.vjp(SkipInit(1.0).apply, variables, x)
  kept = [leaf.dtype for leaf in jax.tree.leaves(vjp) if leaf.shape == x.shape]
  assert kept == [jnp.bfloat16]


@pytest.mark.parametrize("module", [SkipInit(1.0), LayerScale(), ScalarBias()])
def test_param_dtype(module, branch):
  module = module.clone(param_dtype=jnp.bfloat16)
  output, variables = module.init_with_output(jax.random.key(0), branch)
  assert [leaf.dtype for leaf in jax.tree.leaves(variables)] == [jnp.bfloat16]
  assert output.dtype == jnp.float32
