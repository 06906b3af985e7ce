"""The state of a training run: all that a checkpoint holds."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from skipinit_jax.training.compilation import compiler_options
from skipinit_jax.training.mesh import fsdp_sharding, replicated


class Sums(struct.PyTreeNode):
  """Sums over the steps of the current epoch, from which its means are made.

  They are part of the state, so that a resumed epoch reports the same means.

  Attributes:
    steps: steps taken in this epoch.
    loss: sum of the steps' losses.
    accuracy: sum of the steps' accuracies.
    grad_norm: sum of the global norms of the gradients, before clipping and L2.
  """

  steps: jax.Array
  loss: jax.Array
  accuracy: jax.Array
  grad_norm: jax.Array

  @classmethod
  def zero(cls) -> "Sums":
    """Returns the sums at the start of an epoch."""
    return cls(*(jnp.zeros((), jnp.float32) for _ in range(4)))


class Keys(NamedTuple):
  """Independent random keys; the epoch or the step is folded into each.

  Attributes:
    order: of the order of the examples, by epoch.
    augment: of augmentation, by step.
    dropout: of dropout, by step.
  """

  order: jax.Array
  augment: jax.Array
  dropout: jax.Array


class TrainState(struct.PyTreeNode):
  """The state of a training run.

  Attributes:
    step: optimizer steps taken; with the seed it is also the position in the data.
    params: the parameters.
    model_state: the other variables of the model, such as batch statistics.
    opt_state: the optimizer's state.
    key_data: the run's random key, as `jax.random.key_data` gives it.
    sums: what the current epoch's metrics are made of.
  """

  step: jax.Array
  params: chex.ArrayTree
  model_state: Any
  opt_state: optax.OptState
  key_data: jax.Array
  sums: Sums

  def random_keys(self) -> Keys:
    """Returns the run's independent random keys."""
    return Keys(*jax.random.split(jax.random.wrap_key_data(self.key_data), 3))


def state_sharding(state: TrainState, mesh: Mesh, *, shard_params: bool) -> TrainState:
  """Returns how a state lies on the mesh.

  Args:
    state: a state, or the `jax.ShapeDtypeStruct`s of one.
    mesh: the mesh.
    shard_params: whether parameters and the optimizer's state are cut among the devices
      (see `mesh.fsdp_sharding`), or whole on each of them, as all else is in any case.

  Returns:
    A state of shardings.
  """
  shardings: TrainState = jax.tree.map(lambda _: replicated(mesh), state)
  if not shard_params:
    return shardings
  return shardings.replace(
    params=fsdp_sharding(state.params, mesh),
    opt_state=fsdp_sharding(state.opt_state, mesh),
  )


def make_init(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  image_shape: tuple[int, ...],
  *,
  mesh: Mesh,
  shard_params: bool = False,
) -> jax.stages.Wrapped:
  """Returns a jitted function that initializes the state on the mesh.

  Args:
    model: the network, called as `model(images, train)`.
    optimizer: the optimizer.
    image_shape: height, width and channels.
    mesh: the mesh.
    shard_params: how the state lies on it; see `state_sharding`.

  Returns:
    A function of the run's seed, a uint32 scalar, that returns a `TrainState`.
  """

  def init(seed: jax.Array) -> TrainState:
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, jnp.zeros((1, *image_shape)), train=False)
    params = variables.pop("params")
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=variables,
      opt_state=optimizer.init(params),
      key_data=jax.random.key_data(run_key),
      sums=Sums.zero(),
    )

  shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((), jnp.uint32))
  return jax.jit(
    init,
    out_shardings=state_sharding(shapes, mesh, shard_params=shard_params),
    compiler_options=compiler_options(),
  )
