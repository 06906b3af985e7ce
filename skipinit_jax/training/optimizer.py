"""The optimizer: SGD with momentum and L2 by parameter role."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from skipinit_jax.models.depth import is_stacked
from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.schedules import make_schedule

_SCALES = ("scale", "alpha")
_CLASSIFIER = "classifier"


def parameter_roles(params: chex.ArrayTree) -> Any:
  """Returns the role of every parameter.

  Returns:
    A tree of the same structure: "bias" for every kind of bias; "scale" for the scales
    of normalizers, branches (SkipInit's alpha) and standardized weights; "kernel" for
    all else.
  """

  def role(path: tuple[Any, ...], _: jax.Array) -> str:
    name = path[-1].key
    return "bias" if name == "bias" else "scale" if name in _SCALES else "kernel"

  return jax.tree.map_with_path(role, params)


def adaptive_grad_clip(clipping: float) -> optax.GradientTransformation:
  """`optax.adaptive_grad_clip` of all layers but the classifier, block by block.

  Brock et al. (ICML 2021), section 4: the last linear layer is not clipped. Here it is
  what is called `classifier`. Parameters of a scanned stack have an axis over the
  blocks, which is no part of any unit.

  Args:
    clipping: largest ratio of a unit's gradient norm to its parameter norm.
  """
  clip = optax.adaptive_grad_clip(clipping)

  def clip_leaf(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> Any:
    def clip_block(update: jax.Array, param: jax.Array) -> Any:
      return clip.update(update, clip.init(param), param)[0]

    if any(key.key == _CLASSIFIER for key in path):
      return update
    return (jax.vmap(clip_block) if is_stacked(path) else clip_block)(update, param)

  def clip_tree(updates: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
    return jax.tree.map_with_path(clip_leaf, updates, params)

  return optax.stateless(clip_tree)


class AveragedParams(NamedTuple):
  """State of `average_params`.

  Attributes:
    averaged_params: the average, in float32 at least.
  """

  averaged_params: chex.ArrayTree


def average_params(ema_decay: float) -> optax.GradientTransformation:
  """Keeps an exponential moving average of the parameters, from their first values on.

  It changes no update, and has to see the last form of each: it ends a chain.

  Args:
    ema_decay: the average's own weight at each step.
  """

  def init(params: chex.ArrayTree) -> AveragedParams:
    # With 8 bits, an average would not see small changes.
    return AveragedParams(
      jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)
    )

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    new = optax.apply_updates(params, updates)
    average = optax.incremental_update(new, state.averaged_params, 1 - ema_decay)
    return updates, AveragedParams(average)

  return optax.GradientTransformation(init, update)


def make_optimizer(
  config: TrainConfig,
  steps_per_epoch: int,
  learning_rate: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformation:
  """Returns the configured optimizer.

  The gradient is clipped, then L2 is added to it, then momentum accumulates it, as
  in PyTorch's SGD. The highest rate is part of the optimizer's state: runs that
  differ in it share one compiled program.

  Args:
    learning_rate: the schedule's highest rate, which may be traced; None: the
      configuration's.
  """
  if learning_rate is None:
    learning_rate = config.learning_rate

  def has_l2(params: Any) -> Any:
    roles = parameter_roles(params)
    return jax.tree.map(lambda role: role not in config.l2_exempt, roles)

  transformations = []
  if config.clip_norm is not None:
    transformations.append(optax.clip_by_global_norm(config.clip_norm))
  if config.adaptive_clip is not None:
    transformations.append(adaptive_grad_clip(config.adaptive_clip))
  return optax.chain(
    *transformations,
    optax.add_decayed_weights(config.l2, mask=has_l2),
    optax.trace(decay=config.momentum, nesterov=config.nesterov),
    optax.scale_by_schedule(make_schedule(config, steps_per_epoch)),
    optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate),
    *([] if config.ema_decay is None else [average_params(config.ema_decay)]),
  )
