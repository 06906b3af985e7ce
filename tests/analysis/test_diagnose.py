"""Verdicts on predicted signals, on measured networks, and on a user's own."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import analysis, methods
from skipinit_jax.analysis import diagnose, diagnose_signal, measure, theory
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResidualMLP


def verdict(name, depth, *, layers=1, cosine=0.0, **changes):
  method = dataclasses.replace(methods.get(name), **changes)
  network = theory.uniform(method, depth, layers_per_block=layers)
  return diagnose_signal(
    theory.predict(network, theory.Kernel.uniform(1.0, cosine), 64)
  )


@pytest.mark.parametrize(
  ("name", "depth"),
  [
    ("batch_norm", 300),
    ("skipinit", 1000),
    ("skipinit_inverse_sqrt_depth", 1000),
    ("fixup", 1000),
    ("nf_resnet", 1000),
    ("rezero", 1000),
    ("layer_scale", 1000),
    ("unnormalized", 6),
    ("divide_by_sqrt2", 16),
    ("batch_norm_divide_by_sqrt2", 16),
  ],
)
def test_networks_that_train_are_healthy(name, depth):
  diagnosis = verdict(name, depth, layers=2 if name == "fixup" else 1)
  assert diagnosis.healthy
  assert (diagnosis.alpha, diagnosis.advice) == (None, ())
  assert f"passes all {depth} blocks" in str(diagnosis)


def test_doubling_explodes_in_both_directions():
  diagnosis = verdict("unnormalized", 100)
  forward, backward, distance = diagnosis.faults
  assert (forward.kind, forward.direction) == ("explodes", "forward")
  harmless = int(np.log2(analysis.FORWARD_LIMIT))
  assert (forward.block, forward.harmless_depth) == (harmless + 1, harmless)
  assert forward.name == str(harmless + 1)
  np.testing.assert_allclose(forward.value, 2.0**100)
  assert (backward.kind, backward.direction) == ("explodes", "backward")
  steps = int(np.log2(analysis.GRADIENT_LIMIT))
  assert backward.block == 100 - steps
  # The median block of d is d / 2 blocks from the end.
  assert backward.harmless_depth in (2 * steps, 2 * steps + 1)
  assert distance.kind == "loses its inputs"
  np.testing.assert_allclose(diagnosis.alpha, 0.1)
  assert "Start each branch at 0.1 times its present size, or at 0" in str(diagnosis)


@pytest.mark.parametrize("name", ["unnormalized", "divide_by_sqrt2"])
def test_advice_helps(name):
  diagnosis = verdict(name, 200)
  repaired = verdict(name, 200, alpha=diagnosis.alpha, sum_scale=1.0)
  assert not diagnosis.healthy and repaired.healthy
  assert verdict(name, 200, alpha=0.0, sum_scale=1.0).healthy
  np.testing.assert_allclose(repaired.forward_growth, np.e, rtol=0.01)


@pytest.mark.parametrize(
  ("name", "kind", "direction", "advice"),
  [
    ("unnormalized", "explodes", "forward", "Start each branch at"),
    ("divide_by_sqrt2", "loses its inputs", "forward", "second moment by 0.5 in each"),
    ("batch_norm_divide_by_sqrt2", "explodes", "backward", "Leave the sum of"),
  ],
)
def test_shallower_networks_are_healthy(name, kind, direction, advice):
  diagnosis = verdict(name, 200)
  fault, *others = diagnosis.faults
  assert (fault.kind, fault.direction) == (kind, direction)
  # Division keeps the second moment, and normalization the distance of the inputs.
  assert bool(others) == (name == "unnormalized")
  assert advice in str(diagnosis)
  assert verdict(name, fault.harmless_depth).healthy
  assert not verdict(name, fault.harmless_depth + 1).healthy


def test_sums_that_are_too_small_vanish():
  diagnosis = verdict("unnormalized", 50, sum_scale=0.5)
  kinds = {(fault.kind, fault.direction) for fault in diagnosis.faults}
  assert {("vanishes", "forward"), ("vanishes", "backward")} <= kinds


def test_inputs_that_are_equal_are_not_the_networks_fault():
  diagnosis = verdict("skipinit", 5, cosine=0.999)
  (fault,) = diagnosis.faults
  assert (fault.block, fault.harmless_depth, fault.name) == (0, 0, "")
  assert "cosine similarity of 1 - 0.001" in str(diagnosis)
  assert diagnosis.advice == ("Center the inputs over the examples.",)


def images(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_signal_that_overflows():
  """Twice the depth at which the squares of float32 end, and more than the features."""
  x = images(8, 16)
  model = ResidualMLP(300, 16, 2, methods.get("skipinit_one"))
  variables = model.init(jax.random.key(0), x, train=True)
  # In the mode that trains it.
  diagnosis = diagnose(model, variables, x)
  fault = diagnosis.faults[0]
  assert (fault.kind, fault.direction, fault.value) == ("explodes", "forward", np.inf)
  assert 5 < fault.harmless_depth < 40
  assert 0.03 < diagnosis.alpha < 0.1
  assert "an infinite factor" in str(diagnosis)


class OwnBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + 2 * nn.Dense(x.shape[-1], use_bias=False, name="last")(x)


class OwnNetwork(nn.Module):
  num_blocks: int

  @nn.compact
  def __call__(self, x):
    for index in range(self.num_blocks):
      x = OwnBlock(name=f"layer_{index}")(x)
    return x


def test_a_users_network():
  x, model = images(8, 128), OwnNetwork(8)
  variables = jax.jit(model.init)(jax.random.key(0), x)
  run = functools.partial(diagnose, model, variables, x)
  diagnosis = run(blocks=measure.Blocks(OwnBlock))
  fault = diagnosis.faults[0]
  # 5^6 is the first power above the limit.
  assert (fault.kind, fault.block, fault.name) == ("explodes", 6, "layer_5")
  np.testing.assert_allclose(diagnosis.alpha, 1 / np.sqrt(8 * 4), rtol=0.1)
  with pytest.raises(UsageError, match="no residual blocks of class ResidualBlock"):
    run()
  with pytest.raises(UsageError, match=r"has 1 example\(s\)"):
    diagnose(model, variables, x[:1], blocks=measure.Blocks("layer_*"))
