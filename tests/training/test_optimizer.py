import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import unroll_variables
from skipinit_jax.training import optimizer as optimizer_lib
from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.transformations import parameter_roles
from tests.training.runs import assert_close

# A weight, a normalizer's scale, alpha, and biases of three kinds.
SHAPES = {
  "stage": {
    "conv": {"kernel": (3, 3, 2, 4)},
    "norm": {"scale": (4,), "bias": (4,)},
    "branch_scale": {"alpha": ()},
    "branch_bias": {"bias": ()},
  },
  "classifier": {"kernel": (4, 3), "bias": (3,)},
}
ROLES = {
  "stage": {
    "conv": {"kernel": "kernel"},
    "norm": {"scale": "scale", "bias": "bias"},
    "branch_scale": {"alpha": "scale"},
    "branch_bias": {"bias": "bias"},
  },
  "classifier": {"kernel": "kernel", "bias": "bias"},
}


def draw(shapes, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: np.asarray(rng.normal(size=shape), np.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


assert_near = functools.partial(assert_close, rtol=1e-5, atol=1e-6)


def run(optimizer, params, all_grads):
  """Returns the parameters after each step of an optimizer, or a configuration's."""
  if isinstance(optimizer, TrainConfig):
    optimizer = optimizer_lib.make_optimizer(optimizer, steps_per_epoch=2)
  state = optimizer.init(params)

  @jax.jit
  def step(grads, state, params):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  trajectory = []
  for grads in all_grads:
    params, state = step(grads, state, params)
    trajectory.append(params)
  return trajectory


@pytest.mark.parametrize(
  ("method", "num_scales"),
  # Two blocks in each of three stages. Fixup has no normalizer.
  [
    ("batch_norm", 2 * 6 + 1),
    ("fixup", 6),
    ("nf_resnet", 1 + 12 + 2 + 6),
    ("layer_scale", 6),
  ],
)
def test_roles_of_networks(method, num_scales):
  model = TrainConfig(depth=16, method=method).make_model(10)
  params = jax.eval_shape(
    functools.partial(model.init, train=False),
    jax.random.key(0),
    jnp.zeros((1, 8, 8, 1)),
  )["params"]
  roles = parameter_roles(params)
  assert jax.tree.leaves(roles).count("scale") == num_scales
  for (path, leaf), role in zip(
    jax.tree.leaves_with_path(params), jax.tree.leaves(roles), strict=True
  ):
    name = jax.tree_util.keystr(path)
    # Kernels are the parameters of two or more dimensions, but for the stack's.
    assert (role == "kernel") == (leaf.ndim - ("'blocks'" in name) >= 2), name


@pytest.mark.parametrize(
  ("nesterov", "exempt"), [(False, ()), (True, ("scale", "bias")), (False, ("kernel",))]
)
def test_sgd_by_hand(nesterov, exempt):
  config = TrainConfig(
    learning_rate=0.3,
    momentum=0.8,
    nesterov=nesterov,
    l2=0.1,
    l2_exempt=exempt,
    schedule="halving",
    constant_epochs=1,
    halve_every_epochs=0.5,
  )
  start = draw(SHAPES, 0)
  all_grads = [draw(SHAPES, seed) for seed in (1, 2, 3, 4)]
  l2 = jax.tree.map(lambda role: 0.0 if role in exempt else 0.1, ROLES)
  params, velocity = start, jax.tree.map(np.zeros_like, start)
  # Two steps at the highest rate, then a halving every step.
  rates = (0.3, 0.3, 0.3 / 2, 0.3 / 4)
  actual = run(config, start, all_grads)
  for rate, grads, after in zip(rates, all_grads, actual, strict=True):
    grads = jax.tree.map(lambda g, c, p: g + c * p, grads, l2, params)
    velocity = jax.tree.map(lambda v, g: 0.8 * v + g, velocity, grads)
    nesterovs = jax.tree.map(lambda g, v: g + 0.8 * v, grads, velocity)
    direction = nesterovs if nesterov else velocity
    params = jax.tree.map(lambda p, d, rate=rate: p - rate * d, params, direction)
    assert_close(after, params, rtol=2e-5, atol=1e-6)


def test_global_clip_before_l2():
  params, grads = draw(SHAPES, 0), draw(SHAPES, 1)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
  for clip, scale in ((norm / 4, 1 / 4), (2 * norm, 1)):
    config = TrainConfig(learning_rate=1.0, momentum=0.0, l2=0.1, clip_norm=float(clip))
    (after,) = run(config, params, [grads])
    expected = jax.tree.map(lambda p, g, s=scale: p - (s * g + 0.1 * p), params, grads)
    assert_near(after, expected)


def test_adaptive_clip_by_hand():
  clipping = 0.05
  shapes = {"kernel": (3, 3, 2, 4), "dense": {"kernel": (4, 3)}, "bias": (3,)}
  shapes["classifier"] = {"kernel": (4, 3), "bias": (3,)}
  params, grads = draw(shapes, 0), draw(shapes, 1)
  # One unit of each kernel has a small gradient, which stays as it is.
  grads["kernel"][..., 1] *= 1e-3
  grads["dense"]["kernel"][:, 2] *= 1e-3

  def clip(param, grad, axes):
    # A unit is what makes one output feature; a vector is one unit.
    param_norm = np.sqrt(np.sum(param**2, axes, keepdims=True))
    grad_norm = np.sqrt(np.sum(grad**2, axes, keepdims=True))
    return grad * np.minimum(1, clipping * np.maximum(param_norm, 1e-3) / grad_norm)

  expected = {
    "kernel": clip(params["kernel"], grads["kernel"], (0, 1, 2)),
    "dense": {"kernel": clip(params["dense"]["kernel"], grads["dense"]["kernel"], 0)},
    "bias": clip(params["bias"], grads["bias"], 0),
    "classifier": grads["classifier"],
  }
  config = TrainConfig(learning_rate=1.0, momentum=0.0, l2=0.0, adaptive_clip=clipping)
  (after,) = run(config, params, [grads])
  actual = jax.tree.map(jnp.subtract, params, after)
  assert_close(actual, expected, atol=1e-6)


def test_adaptive_clip_lets_grow_what_starts_at_zero():
  shapes = {
    "branch_scale": {"alpha": ()},
    "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "rest": {"blocks": {"branch_scale": {"alpha": (5,), "scale": (5, 4)}}},
    "last": {"blocks": {"conv": {"kernel": (5, 4, 3)}}},
  }
  start, grads = draw(shapes, 0), draw(shapes, 1)
  # LayerScale's smallest start, a bias, and a last layer that two blocks have at zero.
  start["rest"]["blocks"]["branch_scale"] = {
    "alpha": np.zeros(5, np.float32),
    "scale": np.full((5, 4), 1e-6, np.float32),
  }
  start["conv"]["bias"][:] = 0
  start["last"]["blocks"]["conv"]["kernel"][:2] = 0
  fields = {"learning_rate": 1.0, "momentum": 0.0, "l2": 0.0}
  clipped = run(TrainConfig(adaptive_clip=0.01, **fields), start, [grads, grads])
  free = run(TrainConfig(**fields), start, [grads, grads])
  for step in range(2):
    changes = [jax.tree.map(np.subtract, run[step], start) for run in (clipped, free)]
    equal = jax.tree.map(lambda a, b: np.isclose(a, b, rtol=1e-6), *changes)
    kernel = equal["conv"].pop("kernel"), equal["last"]["blocks"]["conv"].pop("kernel")
    assert all(each.all() for each in jax.tree.leaves(equal))
    assert not kernel[0].any()
    assert kernel[1][:2].all() and not kernel[1][2:].any()


def test_rates_by_role_are_those_of_optax_by_label():
  # Plain optax, with an optimizer of its own for each role.
  factors = {"kernel": 0.5, "scale": 2.0, "bias": 0.0}
  config = TrainConfig(
    learning_rate=0.3,
    l2=0.0,
    schedule="constant",
    **{f"{role}_rate_factor": factor for role, factor in factors.items()},
  )
  start, grads = draw(SHAPES, 0), [draw(SHAPES, seed) for seed in (1, 2, 3)]
  reference = optax.partition(
    {role: optax.sgd(0.3 * factor, 0.9) for role, factor in factors.items()}, ROLES
  )
  assert_near(run(config, start, grads)[-1], run(reference, start, grads)[-1])


# Two blocks of a scanned stack beside what is no stack.
STACKED = {"blocks": {"conv": {"kernel": (2, 3, 3, 2, 4)}, "bias": {"bias": (2,)}}}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_other_optimizers_are_those_of_optax(name):
  config = TrainConfig(
    optimizer=name,
    learning_rate=0.1,
    weight_decay=0.2,
    l2_exempt=("bias",),
    schedule="constant",
    scale_rate_factor=0.5,
  )
  config.validate()
  start = draw(SHAPES | {"rest": STACKED}, 0)
  grads = [draw(SHAPES | {"rest": STACKED}, seed) for seed in (1, 2, 3)]

  def with_role(is_meant):
    return lambda params: jax.tree.map(is_meant, parameter_roles(params))

  reference = optax.chain(
    getattr(optax, name)(0.1, weight_decay=0.2, mask=with_role("bias".__ne__)),
    optax.masked(optax.scale(0.5), with_role("scale".__eq__)),
  )
  expected = run(reference, unroll_variables(start), map(unroll_variables, grads))
  assert_near(unroll_variables(run(config, start, grads)[-1]), expected[-1])


def test_an_optimizer_of_ones_own_gets_the_schedule():
  fields = {"learning_rate": 0.3, "l2": 0.0, "constant_epochs": 1, "clip_norm": 0.5}
  config = TrainConfig(**fields, halve_every_epochs=0.5, bias_rate_factor=0.1)
  start, grads = draw(SHAPES, 0), [draw(SHAPES, seed) for seed in (1, 2, 3, 4)]
  own = optimizer_lib.make_optimizer(
    config, 2, optimizer=functools.partial(optax.sgd, momentum=0.9)
  )
  assert_near(run(config, start, grads)[-1], run(own, start, grads)[-1])
  lion = functools.partial(optax.lion, b1=0.8)
  assert optimizer_lib.optimizer_name(lion) == "optax._src.alias.lion(b1=0.8)"


def test_method_brings_its_rates():
  # Zhang, Dauphin & Ma's code: scalars learn at a tenth of the rate.
  method = methods.get("fixup")
  assert method.rate_factors == {"kernel": 1.0, "scale": 0.1, "bias": 0.1}
  fields = TrainConfig(scale_rate_factor=0.5, bias_rate_factor=1.0)
  assert fields.make_method().rate_factors == {"kernel": 1.0, "scale": 0.5, "bias": 1.0}
  with pytest.raises(UsageError, match="scale_rate_factor is -1"):
    dataclasses.replace(method, scale_rate_factor=-1)


def test_adaptive_clip_sees_one_block_of_a_stack():
  shapes = {
    "stem": {"kernel": (3, 3, 1, 4)},
    "rest": {
      "blocks": {
        "conv": {"kernel": (5, 3, 3, 4, 4), "bias": (5, 4)},
        "projection": {"kernel": (5, 4, 4)},
        "branch_scale": {"alpha": (5,)},
      }
    },
  }
  params, grads = jax.tree.map(jnp.asarray, (draw(shapes, 0), draw(shapes, 1)))
  config = TrainConfig(learning_rate=1.0, momentum=0.9, l2=0.1, adaptive_clip=0.02)
  scanned = unroll_variables(run(config, params, [grads, grads])[-1])
  unrolled = run(config, unroll_variables(params), [unroll_variables(grads)] * 2)[-1]
  assert set(unrolled["rest"]) == {f"block{index}" for index in range(5)}
  assert_near(scanned, unrolled)


def test_rate_is_state():
  params, grads = draw(SHAPES, 0), draw(SHAPES, 1)

  def program(learning_rate):
    config = TrainConfig(learning_rate=learning_rate)
    optimizer = optimizer_lib.make_optimizer(config, 10)
    state = optimizer.init(params)
    return jax.jit(optimizer.update).lower(grads, state, params).as_text()

  assert program(2**-9) == program(2**-2)
