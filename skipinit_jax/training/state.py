"""The state of a training run: all that a checkpoint holds."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct, traverse_util
from jax.sharding import Mesh

from skipinit_jax.compilation import compiler_options
from skipinit_jax.training.mesh import fsdp_sharding, replicated


class EpochMetrics(struct.PyTreeNode):
  """Metrics of the current epoch, as sums over its steps.

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
  def zero(cls) -> Self:
    """Returns the sums at the start of an epoch."""
    return cls(*(jnp.zeros((), jnp.float32) for _ in range(4)))

  def means(self) -> dict[str, float]:
    """Returns the means over the epoch's steps, by name."""
    steps, *sums = map(float, jax.device_get(jax.tree.leaves(self)))
    names = ("loss", "accuracy", "grad_norm")
    return {n: total / max(steps, 1.0) for n, total in zip(names, sums, strict=True)}


class Keys(NamedTuple):
  """Independent random keys.

  Attributes:
    order: for the order of the examples; the epoch is folded in.
    augment: for augmentation; the step is folded in.
    dropout: for dropout; the step is folded in.
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
    sums: the current epoch's metrics.
  """

  step: jax.Array
  params: chex.ArrayTree
  model_state: Any
  opt_state: optax.OptState
  key_data: jax.Array
  sums: EpochMetrics

  def random_keys(self) -> Keys:
    """Returns the run's independent random keys."""
    return Keys(*jax.random.split(jax.random.wrap_key_data(self.key_data), 3))

  def averaged(self) -> Self | None:
    """Returns the state with the parameters' moving average in place of them.

    Returns:
      The state, with statistics as they are; None where the optimizer keeps no average:
      see `TrainConfig.ema_decay`.
    """
    average = optax.tree.get(self.opt_state, "averaged_params")
    return None if average is None else self.replace(params=average)


def state_sharding(state: TrainState, mesh: Mesh, *, shard_params: bool) -> TrainState:
  """Returns how a state lies on the mesh.

  Args:
    state: a state, or one of `jax.ShapeDtypeStruct`.
    mesh: the devices that share it.
    shard_params: whether parameters and the optimizer's state are cut among the devices
      (see `mesh.fsdp_sharding`). Everything else is whole on each device.

  Returns:
    A state whose leaves are shardings.
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
  make_optimizer: Callable[[Any], optax.GradientTransformation],
  image_shape: tuple[int, ...],
  *,
  mesh: Mesh,
  shard_params: bool = False,
) -> tuple[jax.stages.Wrapped, TrainState]:
  """Returns a jitted function that initializes the state, and the state's sharding.

  Args:
    model: the network, called as `model(images, train)`.
    make_optimizer: returns the optimizer for a learning rate, which is traced: runs
      that differ in their rate share one compiled program.
    image_shape: height, width and channels.
    shard_params: how the state lies on it; see `state_sharding`.

  Returns:
    A function of the run's seed, a uint32 scalar, and its learning rate, a float32
    scalar, that returns a `TrainState`; and that state's sharding. A third argument of
    the function, variables by the model's names, takes the place of initial values.
  """

  def init(
    seed: jax.Array, learning_rate: jax.Array, weights: Any = None
  ) -> TrainState:
    init_key, run_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, jnp.zeros((1, *image_shape)), train=False)
    if weights is not None:
      variables = _replaced(variables, weights)
    params = variables.pop("params")
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=variables,
      # optax takes a number of NumPy's, as it comes without `jax.jit`, for no rate.
      opt_state=make_optimizer(jnp.asarray(learning_rate)).init(params),
      key_data=jax.random.key_data(run_key),
      sums=EpochMetrics.zero(),
    )

  shapes = jax.eval_shape(
    init, *(jax.ShapeDtypeStruct((), dtype) for dtype in (jnp.uint32, jnp.float32))
  )
  sharding = state_sharding(shapes, mesh, shard_params=shard_params)
  return jax.jit(
    init, out_shardings=sharding, compiler_options=compiler_options()
  ), sharding


def _replaced(variables: Any, weights: Any) -> Any:
  """Returns variables with other values where there are some."""
  flat, others = map(traverse_util.flatten_dict, (variables, weights))
  values = {path: others[path].astype(flat[path].dtype) for path in others}
  return traverse_util.unflatten_dict(flat | values)
