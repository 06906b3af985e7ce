"""Peers train the same network, and what is measured is theirs."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import peer_flax, peer_jax, side_by_side
from benchmarks.peer import Case
from benchmarks.side_by_side import Peer
from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import WideResNet

CASE = Case(depth=16, width=2, image_size=8, batch_size=3, method="skipinit")


def our_network(case):
  model = WideResNet(
    case.depth, case.width, 10, methods.get(case.method), scan=False, remat=case.remat
  )
  return lambda key, images: model.init(key, images, train=True)


def parameters(init):
  images = jnp.zeros((1, 8, 8, 3))
  shapes = jax.eval_shape(init, jax.random.key(0), images)["params"]
  return sorted(leaf.shape for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("method", ["skipinit", "batch_norm", "unnormalized"])
def test_peers_have_the_same_parameters(method):
  case = dataclasses.replace(CASE, method=method)
  ours = parameters(our_network(case))
  plain = peer_flax.WideResNet(case.depth, case.width, method)
  assert parameters(plain.init) == ours
  pytest.importorskip("torch", reason="needs PyTorch: pip install '.[torch]'")
  from benchmarks import peer_torch

  network = peer_torch.wide_resnet(case.depth, case.width, method)
  theirs = sorted(math.prod(p.shape) for p in network.parameters())
  assert theirs == sorted(math.prod(shape) for shape in ours)


def products(jaxpr):
  """Multiply-adds of the convolutions and matrix products, boundaries included."""
  total = 0
  for equation in jaxpr.eqns:
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
    ):
      if hasattr(inner, "jaxpr"):
        total += products(inner.jaxpr)
    if equation.primitive.name == "conv_general_dilated":
      *window, inputs, _ = equation.invars[1].aval.shape
      total += equation.outvars[0].aval.size * math.prod(window) * inputs
    elif equation.primitive.name == "dot_general":
      total += equation.outvars[0].aval.size * equation.invars[0].aval.shape[-1]
  return total


@pytest.mark.parametrize("width", [1, 2])
def test_the_counted_operations_are_those_of_the_network(width):
  case = dataclasses.replace(CASE, width=width)
  network = peer_flax.WideResNet(case.depth, case.width, case.method)
  images = jnp.zeros((case.batch_size, 8, 8, 3))
  variables = jax.eval_shape(network.init, jax.random.key(0), images)
  forward = products(jax.make_jaxpr(network.apply)(variables, images).jaxpr)
  stem = case.batch_size * 8 * 8 * 9 * 3 * 16
  assert case.step_flops == 2 * (3 * forward - stem)


def test_a_measurement(monkeypatch):
  monkeypatch.setattr(side_by_side, "_ROUND_SECONDS", 0.1)
  result = side_by_side.measure(
    # The tests' machine has eight devices.
    Case(10, 1, image_size=8, batch_size=8, method="skipinit"),
    [side_by_side.SKIPINIT_JAX],
    rounds=1,
  )
  (measured,) = result.values()
  step = measured.step_seconds
  assert 0 < step["min"] <= step["median"] <= step["max"]
  # Compiling takes longer than a step, and JAX alone more than 50 megabytes.
  assert measured.seconds_to_first_step > step["median"]
  assert measured.peak_gigabytes > 0.05


def test_a_peer_that_fails():
  with pytest.raises(UsageError, match="broken ended with status 1"):
    side_by_side.measure(CASE, [Peer("broken", "no_such_peer")], rounds=1)


def test_the_scalar_needs_no_memory():
  skipinit, unnormalized = (
    peer_jax.compile_step(Case(10, 1, image_size=8, batch_size=128, method=method))[1]
    for method in ("skipinit", "unnormalized")
  )
  assert 0 < skipinit < 1.05 * unnormalized
