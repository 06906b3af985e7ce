"""A run, its measurement and its diagnosis under JAX's switches that find errors."""

import contextlib
import dataclasses
import functools
import gc

import jax
import numpy as np
import optax
import pytest

from skipinit_jax.analysis import diagnose
from skipinit_jax.training import TrainConfig
from tests.training.runs import dispatch, make_trainer

CONFIG = TrainConfig(
  model="residual_mlp",
  depth=2,
  width=4,
  batch_size=8,
  learning_rate=0.05,
  method="regularized_skipinit",
)
GHOSTS = dataclasses.replace(
  CONFIG, method="batch_norm", ghost_batch_size=4, accumulation_steps=2
)
# Few shapes, and a stack whose initial values do not depend on how often it is traced.
SMALL = dataclasses.replace(
  CONFIG, method="skipinit", depth=1, width=10, batch_size=10, scan=False
)
# Switches that get along share a lane, because each lane is compiled anew.
LANES = {
  "64 bits": (GHOSTS, {"enable_x64": True, "default_matmul_precision": "highest"}),
  "numbers": (
    CONFIG,
    {"debug_nans": True, "debug_infs": True, "debug_key_reuse": True},
  ),
  "promotion and transfers": (
    GHOSTS,
    {
      "numpy_rank_promotion": "raise",
      "numpy_dtype_promotion": "strict",
      "transfer_guard": "disallow",
      "log_compiles": True,
      "disallow_mesh_context_manager": True,
    },
  ),
  "tracing": (
    CONFIG,
    {
      "check_tracer_leaks": True,
      "enable_checks": True,
      "legacy_prng_key": "error",
      "check_static_indices": True,
    },
  ),
  "random numbers": (
    CONFIG,
    {
      "default_prng_impl": "rbg",
      "threefry_partitionable": False,
      "enable_custom_prng": True,
    },
  ),
  # Without jit: each operation is a program, and small ones are cached too.
  "operations": (SMALL, {"persistent_cache_min_compile_time_secs": 0.0}),
}


def run(config):
  """Losses in training and evaluation, and the growth of signal and gradient."""
  with make_trainer(config, num_examples=32) as trainer:
    state = dispatch(trainer, 2)
    rate = optax.tree.get(state.opt_state, "learning_rate")
    assert float(rate) == np.float32(config.learning_rate)
    metrics = trainer.evaluate(state)
    signal = trainer.measure_signal(state)
    model = config.make_model(10)
    variables = {"params": state.params, **state.model_state}
    with jax.transfer_guard("allow"):
      images = jax.device_put(np.random.default_rng(0).normal(size=(8, 8, 8, 1)))
      key = jax.random.key(0)
      diagnosis = diagnose(model, variables, images.astype(np.float32), key=key)
  assert diagnosis.healthy
  assert len(signal.names) == config.depth
  losses = [state.sums.loss, metrics["loss"], metrics["top5_accuracy"]]
  return [*map(float, losses), diagnosis.forward_growth, diagnosis.cosine]


@functools.cache
def undisturbed(method):
  """What the configuration of a method comes to without a switch."""
  (config,) = (each for each in (CONFIG, GHOSTS, SMALL) if each.method == method)
  return run(config)


@pytest.mark.parametrize("lane", LANES)
def test_same_numbers(lane):
  config, switches = LANES[lane]
  others = lane in ("64 bits", "random numbers")
  # These draw other initial values.
  expected = None if others else undisturbed(config.method)
  with contextlib.ExitStack() as stack:
    # As a context manager, which holds for this thread alone.
    stack.enter_context(jax.disable_jit(lane == "operations"))
    # The check for leaks collects garbage after each trace: here what is new alone.
    gc.collect()
    gc.freeze()
    for name, value in switches.items():
      stack.callback(jax.config.update, f"jax_{name}", jax.config.values[f"jax_{name}"])
      jax.config.update(f"jax_{name}", value)
    actual = run(config)
  if others:
    assert np.isfinite(actual).all()
  else:
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
