"""SkipInit's multiplier, LayerScale and Fixup's bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.layers import LayerScale, ScalarBias, SkipInit


@pytest.fixture(scope="module")
def branch():
  return jax.random.normal(jax.random.key(0), (4, 5, 3))


@pytest.mark.parametrize("initial_value", [0.0, 0.25, 1.0])
def test_alpha_is_one_parameter_of_its_own(branch, initial_value):
  variables = SkipInit(initial_value).init(jax.random.key(0), branch)
  assert jax.tree.map(jnp.shape, variables) == {"params": {"alpha": ()}}
  assert variables["params"]["alpha"] == initial_value
  output = SkipInit(initial_value).apply(variables, branch)
  np.testing.assert_allclose(output, initial_value * branch, rtol=1e-6)


def test_apply_uses_the_parameter_not_the_initial_value(branch):
  output = SkipInit(0.0).apply({"params": {"alpha": jnp.float32(-3)}}, branch)
  np.testing.assert_allclose(output, -3 * branch, rtol=1e-6)


def test_gradients(branch):
  cotangent = jax.random.normal(jax.random.key(1), branch.shape)
  variables = {"params": {"alpha": jnp.float32(0)}}
  _, vjp = jax.vjp(SkipInit().apply, variables, branch)
  gradient, branch_gradient = vjp(cotangent)
  # At alpha = 0 the branch gets no gradient, but alpha does: it is how training starts.
  alpha_gradient = np.sum(np.asarray(branch, np.float64) * np.asarray(cotangent))
  np.testing.assert_allclose(gradient["params"]["alpha"], alpha_gradient, rtol=1e-5)
  assert not np.any(branch_gradient)


def test_fixed_alpha_has_no_parameter(branch):
  module = SkipInit(0.5, learnable=False)
  assert not jax.tree.leaves(module.init(jax.random.key(0), branch))
  np.testing.assert_allclose(module.apply({}, branch), 0.5 * branch, rtol=1e-6)


def test_layer_scale_has_a_factor_for_each_channel(branch):
  variables = LayerScale(1e-5).init(jax.random.key(0), branch)
  assert jax.tree.map(jnp.shape, variables) == {"params": {"scale": (3,)}}
  np.testing.assert_allclose(variables["params"]["scale"], 1e-5, rtol=1e-6)
  factors = jnp.array([2.0, -1.0, 0.0])
  output = LayerScale().apply({"params": {"scale": factors}}, branch)
  np.testing.assert_allclose(output, branch * factors, rtol=1e-6)
  constant = LayerScale(0.5, learnable=False)
  assert not jax.tree.leaves(constant.init(jax.random.key(0), branch))
  np.testing.assert_allclose(constant.apply({}, branch), 0.5 * branch, rtol=1e-6)


def test_layer_scale_gradient_is_that_of_each_channel(branch):
  cotangent = jax.random.normal(jax.random.key(1), branch.shape)
  variables = {"params": {"scale": jnp.array([0.1, 0.2, 0.3])}}
  _, vjp = jax.vjp(LayerScale().apply, variables, branch)
  gradient, branch_gradient = vjp(cotangent)
  products = np.asarray(branch, np.float64) * np.asarray(cotangent)
  np.testing.assert_allclose(
    gradient["params"]["scale"], products.sum((0, 1)), rtol=1e-4
  )
  np.testing.assert_allclose(
    branch_gradient, cotangent * np.array([0.1, 0.2, 0.3]), rtol=1e-5
  )


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
  variables = module.init(jax.random.key(0), branch)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("bfloat16")}
  assert module.apply(variables, branch).dtype == jnp.float32
