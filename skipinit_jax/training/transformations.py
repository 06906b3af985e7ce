"""What optimizers are made of: clipping, decay, rates by role, averages."""

import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from skipinit_jax.errors import UsageError
from skipinit_jax.models.depth import is_stacked

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
  Each block of a scanned stack is clipped by itself.

  Args:
    clipping: largest ratio of a unit's gradient norm to its parameter norm.
  """
  clip = optax.adaptive_grad_clip(clipping, eps=_SMALL)

  def is_exempt(path: tuple[Any, ...], param: jax.Array) -> jax.Array:
    if not param.ndim or _CLASSIFIER in _names(path):
      return jnp.ones((), bool)
    return jnp.sqrt(jnp.sum(jnp.square(param))) < _SMALL

  def clip_layer(
    _: Any, update: jax.Array, exempt: jax.Array, param: jax.Array
  ) -> jax.Array:
    clipped, _ = clip.update(update, clip.init(param), param)
    return jnp.where(exempt, update, clipped)

  return optax.GradientTransformation(
    lambda params: _map_layers(is_exempt, params),
    lambda updates, exempt, params: (
      _map_layers(clip_layer, updates, exempt, params),
      exempt,
    ),
  )


def _map_layers(function: Callable[..., Any], *trees: Any) -> Any:
  """Maps parameters and the like, each block of a scanned stack by itself.

  A stack's parameters have an axis over the blocks, which is no part of any layer.

  Args:
    function: takes the path of a leaf, and the leaves of all trees there.
  """

  def at(path: tuple[Any, ...], *leaves: jax.Array) -> Any:
    layer = functools.partial(function, path)
    return (jax.vmap(layer) if is_stacked(path) else layer)(*leaves)

  return jax.tree.map_with_path(at, *trees)


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
  trust = optax.scale_by_trust_ratio()

  def scale_layer(_: Any, update: jax.Array, param: jax.Array) -> Any:
    return trust.update(update, trust.init(param), param)[0]

  return optax.chain(
    optax.scale_by_adam(eps=1e-6),
    l2_penalty(weight_decay, l2_exempt),
    optax.stateless(functools.partial(_map_layers, scale_layer)),
  )


OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], ...]] = {
  "sgd": (l2_penalty, heavy_ball),
  "adamw": (adamw,),
  "lamb": (lamb,),
}
"""By each optimizer's name, what takes fields of a configuration for it, in a chain.

Where the first field that a part takes is zero, its other fields have no effect.
"""


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
