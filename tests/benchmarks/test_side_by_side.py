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


@pytest.mark.parametrize(
  ("peer", "method", "version"),
  [("flax", "batch_norm", 1), ("haiku", "skipinit", 2), ("haiku", "nf_resnet", 2)],
)
def test_resnets_have_the_same_parameters(peer, method, version):
  if peer == "haiku":
    pytest.importorskip("haiku", reason="needs dm-haiku: pip install '.[peers]'")
  case = Case(50, 0, 32, 8, method, version=version, scan=False)
  module = importlib.import_module(f"benchmarks.peer_{peer}")
  params = module.jitted_step(case).shapes[0][0]
  ours = peer_jax.jitted_step(case).shapes[0].params
  sizes = [
    sorted(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (params, ours)
  ]
  assert sizes[0] == sizes[1]


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
