"""The optimizer: SGD, AdamW or LAMB, with clipping, decay and rates by role."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from skipinit_jax.errors import UsageError
from skipinit_jax.fields import call, unusual
from skipinit_jax.models.depth import is_stacked
from skipinit_jax.training.schedules import make_schedule

if TYPE_CHECKING:
  from skipinit_jax.training.config import TrainConfig

ROLES: tuple[str, ...] = ("kernel", "scale", "bias")
_SCALES = ("scale", "alpha")
_CLASSIFIER = "classifier"
# Below this norm, `optax.adaptive_grad_clip` clips by this norm instead.
_SMALL = 1e-3


def parameter_roles(params: chex.ArrayTree) -> Any:
  """Returns the role of every parameter.

  Args:
    params: of Linen, or an `nnx.State`, such as `nnx.state(model, nnx.Param)`.

  Returns:
    A tree of the same structure: "bias" for every kind of bias; "scale" for the scales
    of normalizers, branches (SkipInit's alpha) and standardized weights; "kernel" for
    all else.
  """

  def role(path: tuple[Any, ...], _: jax.Array) -> str:
    name = _names(path)[-1]
    return "bias" if name == "bias" else "scale" if name in _SCALES else "kernel"

  return jax.tree.map_with_path(role, params)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Returns the names on a parameter's path, which ends in an attribute in NNX."""
  return tuple(str(entry.key) for entry in path if hasattr(entry, "key"))


def adaptive_grad_clip(clipping: float) -> optax.GradientTransformation:
  """`optax.adaptive_grad_clip` of what has a size to compare the gradient with.

  Brock et al. (ICML 2021), section 4: the last linear layer is not clipped. Here it is
  what is called `classifier`. Scalars, and parameters that start at zero or close to
  it, are not clipped either: SkipInit's alpha, Fixup's last layers, biases. What is
  allowed is in proportion to the parameter, and would keep these where they start.

  Parameters of a scanned stack have an axis over the blocks, which is no part of any
  unit.

  Args:
    clipping: largest ratio of a unit's gradient norm to its parameter norm.
  """
  clip = optax.adaptive_grad_clip(clipping, eps=_SMALL)

  def init(params: chex.ArrayTree) -> Any:
    """Returns which parameters are not clipped, block by block."""

    def is_exempt(path: tuple[Any, ...], param: jax.Array) -> jax.Array:
      num_axes = 1 if is_stacked(path) else 0
      axes = tuple(range(num_axes, param.ndim))
      if not axes or _CLASSIFIER in _names(path):
        return jnp.ones(param.shape[:num_axes], bool)
      return jnp.sqrt(jnp.sum(jnp.square(param), axes)) < _SMALL

    return jax.tree.map_with_path(is_exempt, params)

  def update(updates: chex.ArrayTree, exempt: Any, params: Any) -> Any:
    def clip_leaf(
      path: tuple[Any, ...], update: jax.Array, exempt: jax.Array, param: jax.Array
    ) -> Any:
      def clip_block(update: jax.Array, exempt: jax.Array, param: jax.Array) -> Any:
        clipped, _ = clip.update(update, clip.init(param), param)
        return jnp.where(exempt, update, clipped)

      clip_all = jax.vmap(clip_block) if is_stacked(path) else clip_block
      return clip_all(update, exempt, param)

    return jax.tree.map_with_path(clip_leaf, updates, exempt, params), exempt

  return optax.GradientTransformation(init, update)


def by_block(
  transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Applies a transformation without state to each block of a scanned stack by itself.

  A stack's parameters have an axis over the blocks, which is no part of any layer.
  """

  def update_leaf(update: jax.Array, param: jax.Array) -> Any:
    return transformation.update(update, transformation.init(param), param)[0]

  def update(updates: Any, params: Any) -> Any:
    def of_path(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> Any:
      of_leaf = jax.vmap(update_leaf) if is_stacked(path) else update_leaf
      return of_leaf(update, param)

    return jax.tree.map_with_path(of_path, updates, params)

  return optax.stateless(update)


def l2_penalty(l2: float, l2_exempt: Sequence[str]) -> optax.GradientTransformation:
  """Adds `l2` of each parameter, but for those of exempt roles.

  It is the gradient of `l2/2 |w|^2`, and behind the gradient's normalization decoupled
  weight decay.
  """

  def has_l2(params: Any) -> Any:
    return jax.tree.map(lambda role: role not in l2_exempt, parameter_roles(params))

  return optax.add_decayed_weights(l2, mask=has_l2)


def scale_by_role(factors: Mapping[str, float]) -> optax.GradientTransformation:
  """Multiplies each parameter's step by its role's factor."""

  def scale(updates: Any, params: Any) -> Any:
    del params
    return jax.tree.map(
      lambda update, role: update * factors[role], updates, parameter_roles(updates)
    )

  return optax.stateless(scale)


def heavy_ball(momentum: float, nesterov: bool) -> optax.GradientTransformation:
  """Accumulates the gradient with momentum, as PyTorch's SGD does."""
  return optax.trace(decay=momentum, nesterov=nesterov)


def adamw(
  weight_decay: float, l2_exempt: Sequence[str]
) -> optax.GradientTransformation:
  """`optax.adamw`, without the rate."""
  return optax.chain(optax.scale_by_adam(), l2_penalty(weight_decay, l2_exempt))


def lamb(weight_decay: float, l2_exempt: Sequence[str]) -> optax.GradientTransformation:
  """`optax.lamb`, without the rate, layer by layer also in scanned stacks."""
  return optax.chain(
    optax.scale_by_adam(eps=1e-6),
    l2_penalty(weight_decay, l2_exempt),
    by_block(optax.scale_by_trust_ratio()),
  )


OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], ...]] = {
  "sgd": (l2_penalty, heavy_ball),
  "adamw": (adamw,),
  "lamb": (lamb,),
}
"""By each optimizer's name, what takes fields of a configuration for it, in a chain.

Where the first field that a part takes is zero, its other fields have no effect.
"""

OptimizerFactory = Callable[[optax.Schedule], optax.GradientTransformation]
"""Returns an optimizer for a schedule of rates, as the functions of optax do."""


def optimizer_name(optimizer: OptimizerFactory) -> str:
  """Returns the name of a factory, with what a `functools.partial` sets."""
  function = getattr(optimizer, "func", optimizer)
  name = f"{function.__module__}.{getattr(function, '__qualname__', function)}"
  keywords = getattr(optimizer, "keywords", {})
  settings = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
  return f"{name}({settings})" if settings else name


def frozen_parameters(params: chex.ArrayTree, freeze: Sequence[str]) -> Any:
  """Tells which parameters training leaves as they are.

  Args:
    freeze: roles (see `parameter_roles`), or regular expressions to be found in names
      such as "stage1_first/conv1/kernel"; commas separate several of them.

  Returns:
    A tree of the same structure, of booleans.

  Raises:
    UsageError: an entry fits no parameter or is no regular expression, or no parameter
      is left to train.
  """
  names = jax.tree.map_with_path(lambda path, _: "/".join(_names(path)), params)
  roles = parameter_roles(params)
  frozen = jax.tree.map(lambda _: False, params)
  for entry in ",".join(freeze).split(","):
    try:
      pattern = re.compile(entry)
    except re.error as error:
      raise UsageError(
        f"freeze is {entry}: it is no regular expression ({error})."
      ) from None
    if entry in ROLES:
      found = jax.tree.map(entry.__eq__, roles)
    else:
      found = jax.tree.map(lambda name, p=pattern: p.search(name) is not None, names)
    if not any(jax.tree.leaves(found)):
      some = ", ".join(jax.tree.leaves(names)[:4])
      raise UsageError(
        f"freeze is {entry}: it is no role ({', '.join(ROLES)}) of this network's "
        f"parameters and found in no name, such as {some}."
      )
    frozen = jax.tree.map(operator.or_, frozen, found)
  if all(jax.tree.leaves(frozen)):
    raise UsageError(f"freeze is {','.join(freeze)}: no parameter is left to train.")
  return frozen


def check_parameters(
  config: "TrainConfig", model: nn.Module, image_shape: tuple[int, ...]
) -> None:
  """Checks the fields that are for some of a network's parameters.

  Raises:
    UsageError: `freeze` does not fit them, or a role has a field, and none to train.
  """
  idle = idle_fields(config, model, image_shape)
  for name, _ in unusual(config):
    if name in idle and getattr(config, name):
      raise idle_field(name, getattr(config, name))


def idle_fields(
  config: "TrainConfig", model: nn.Module, image_shape: tuple[int, ...]
) -> set[str]:
  """Returns the fields for roles that no trained parameter has, or that are not set.

  Raises:
    UsageError: `freeze` does not fit the parameters.
  """
  fields = {f"{role}_rate_factor": {role} for role in ROLES}
  fields["l2_exempt"] = {*config.l2_exempt}
  changed = {name for name, _ in unusual(config, type(config)())}
  if not changed.intersection(fields) and not config.freeze:
    return {*fields}
  images = jnp.zeros((1, *image_shape))
  params = jax.eval_shape(
    lambda: model.init(jax.random.key(0), images, train=False)["params"]
  )
  trained = parameter_roles(params)
  if config.freeze:
    frozen = frozen_parameters(params, config.freeze)
    trained = jax.tree.map(lambda role, is_: None if is_ else role, trained, frozen)
  found = {*jax.tree.leaves(trained)}
  return {name for name in fields if name not in changed or not found & fields[name]}


def idle_field(name: str, value: Any) -> UsageError:
  """Returns the error for a field whose role no parameter has."""
  return UsageError(
    f"{name} is {value}: no such parameter is trained here, so it must be left out."
  )


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
  config: "TrainConfig",
  steps_per_epoch: int,
  learning_rate: jax.typing.ArrayLike | None = None,
  optimizer: OptimizerFactory | None = None,
) -> optax.GradientTransformation:
  """Returns the configured optimizer.

  The gradient is clipped; with SGD L2 is then added to it, and momentum accumulates it,
  as in PyTorch; last come the rate and the factor of each parameter's role. The highest
  rate is part of the optimizer's state: runs that differ in it share one compiled
  program. Frozen parameters take no part, and an average sees all of them.

  Args:
    learning_rate: the schedule's highest rate, which may be traced; None: the
      configuration's.
    optimizer: in place of the configuration's, such as `optax.lion`, called with its
      schedule of rates; clipping, factors and the rest stay the configuration's.
  """
  if learning_rate is None:
    learning_rate = config.learning_rate
  transformations = []
  if config.clip_norm is not None:
    transformations.append(optax.clip_by_global_norm(config.clip_norm))
  if config.adaptive_clip is not None:
    transformations.append(adaptive_grad_clip(config.adaptive_clip))
  schedule = make_schedule(config, steps_per_epoch)
  if optimizer is not None:
    peak = learning_rate
    transformations.append(optimizer(lambda step: peak * schedule(step)))
  else:
    transformations += [
      *(call(part, config) for part in OPTIMIZERS[config.optimizer]),
      optax.scale_by_schedule(schedule),
      optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate),
    ]
  factors = config.make_method().rate_factors
  # Without a factor, the state is as it was before there were any.
  by_role = [scale_by_role(factors)] if {*factors.values()} != {1.0} else []
  chain = optax.chain(*transformations, *by_role)
  if config.freeze:
    chain = optax.multi_transform(
      {"trained": chain, "frozen": optax.set_to_zero()},
      lambda params: jax.tree.map(
        lambda frozen: "frozen" if frozen else "trained",
        frozen_parameters(params, config.freeze),
      ),
    )
  if config.ema_decay is not None:
    chain = optax.chain(chain, average_params(config.ema_decay))
  return chain
