"""The optimizer on the state of an NNX network, as on a Linen network's parameters."""

import functools

import jax
import numpy as np
import optax
from flax import nnx

from skipinit_jax import nnx as native
from skipinit_jax.training import TrainConfig, make_optimizer, parameter_roles


class Network(nnx.Module):
  def __init__(self, rngs):
    block = functools.partial(
      native.FullyConnectedBlock,
      3,
      use_bias=True,
      normalizer=nnx.LayerNorm,
      branch_scale=native.SkipInit,
    )
    self.stack = native.DepthStack(block, 2, rngs=rngs)
    self.classifier = nnx.Linear(3, 2, rngs=rngs)


def test_state_of_nnx_is_optimized_like_parameters_of_linen():
  model = Network(nnx.Rngs(0))
  state = nnx.state(model, nnx.Param)
  params = native.to_linen(state)["params"]
  assert native.to_linen(parameter_roles(state))["params"] == parameter_roles(params)

  config = TrainConfig(
    method="fixup", adaptive_clip=0.01, freeze=("norm1",), l2_exempt=("bias", "scale")
  )
  rng = np.random.default_rng(0)
  gradients = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), state)
  transformation = make_optimizer(config, steps_per_epoch=2)
  optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
  of_linen = transformation.init(params)
  for _ in range(2):
    optimizer.update(model, gradients)
    updates, of_linen = transformation.update(
      native.to_linen(gradients)["params"], of_linen, params
    )
    params = optax.apply_updates(params, updates)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6),
    native.to_linen(model)["params"],
    params,
  )
  block = native.to_linen(model)["params"]["stack"]["blocks"]
  assert (block["norm1"]["scale"] == 1).all()
  assert (block["branch_scale"]["alpha"] != 0).all()
