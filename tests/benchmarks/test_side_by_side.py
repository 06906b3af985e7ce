"""Peers train the same network, and what is measured is theirs."""

import dataclasses
import functools
import importlib
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import peer_flax, peer_jax, side_by_side
from benchmarks.peer import Case
from benchmarks.side_by_side import Peer
from skipinit_jax.errors import UsageError

CASE = Case(depth=16, width=2, image_size=8, batch_size=3, method="skipinit")


RESNET = Case(50, 0, image_size=32, batch_size=8, method="batch_norm")


def parameters(peer, case):
  """Returns the parameters of a peer's network."""
  pytest.importorskip(peer, reason="needs the extra `peers`")
  module = importlib.import_module(f"benchmarks.peer_{peer}")
  if peer != "torch":
    state = module.jitted_step(case).shapes[0]
    return jax.tree.leaves(state.params if peer == "jax" else state[0])
  if case.width:
    return module.wide_resnet(case.depth, case.width, case.method).parameters()
  return module.resnet(case.num_classes).parameters()


@pytest.mark.parametrize(
  ("peer", "case"),
  [
    *(
      (peer, dataclasses.replace(CASE, method=method))
      for method in ("skipinit", "batch_norm", "unnormalized")
      for peer in ("flax", "torch")
    ),
    ("flax", RESNET),
    ("torch", RESNET),
    ("haiku", dataclasses.replace(RESNET, method="skipinit", version=2)),
    ("haiku", dataclasses.replace(RESNET, method="nf_resnet", version=2)),
  ],
  ids=lambda value: getattr(value, "method", value),
)
def test_peers_have_the_same_parameters(peer, case):
  case = dataclasses.replace(case, scan=False)
  theirs, ours = (
    sorted(math.prod(each.shape) for each in parameters(name, case))
    for name in (peer, "jax")
  )
  assert theirs == ours


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


@pytest.mark.parametrize(
  "case",
  [CASE, dataclasses.replace(CASE, width=1), Case(50, 0, 64, 3, "batch_norm")],
  ids=lambda case: case.network,
)
def test_the_counted_operations_are_those_of_the_network(case):
  if case.width:
    network = peer_flax.WideResNet(case.depth, case.width, case.method)
    stem = 8 * 8 * 9 * 3 * 16
  else:
    network = peer_flax.ResNet(case.num_classes)
    stem = 32 * 32 * 49 * 3 * 64
  images = jnp.zeros(case.batch_shape)
  variables = jax.eval_shape(network.init, jax.random.key(0), images)
  apply = functools.partial(network.apply, mutable=["batch_stats"])
  forward = products(jax.make_jaxpr(apply)(variables, images).jaxpr)
  assert case.step_flops == 2 * (3 * forward - stem * case.batch_size)


def test_a_peer_that_fails():
  with pytest.raises(UsageError, match="broken ended with status 1"):
    side_by_side.measure(CASE, [Peer("broken", "no_such_peer")], rounds=1)


def test_the_scalar_needs_no_memory():
  skipinit, unnormalized = (
    peer_jax.compile_step(Case(10, 1, image_size=8, batch_size=128, method=method))[1]
    for method in ("skipinit", "unnormalized")
  )
  assert 0 < skipinit < 1.05 * unnormalized
