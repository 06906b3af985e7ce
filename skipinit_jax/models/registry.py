"""Networks by name, as configurations choose them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.fields import taken
from skipinit_jax.files import check_name, check_title
from skipinit_jax.models.residual_mlp import ResidualMLP
from skipinit_jax.models.resnet import ResNet
from skipinit_jax.models.transformer import VisionTransformer
from skipinit_jax.models.wide_resnet import WideResNet


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of network.

  Attributes:
    factory: returns the network: see `register`.
    title: its name for people.
  """

  factory: Callable[..., Any]
  title: str


_KINDS: dict[str, Kind] = {
  "wide_resnet": Kind(WideResNet, "Wide-ResNet"),
  "resnet": Kind(ResNet, "ResNet"),
  "residual_mlp": Kind(ResidualMLP, "MLP"),
  "vision_transformer": Kind(VisionTransformer, "Vision Transformer"),
}


def known_names() -> tuple[str, ...]:
  """Returns the names that `model` may have in a configuration."""
  return tuple(_KINDS)


def get(name: str) -> Kind:
  """Returns the kind of network of a name.

  Raises:
    UsageError: no kind has this name; the message lists those that exist.
  """
  if name not in _KINDS:
    raise unknown_name("model", name, _KINDS)
  return _KINDS[name]


def register(
  name: str, factory: Callable[..., Any], *, title: str | None = None
) -> None:
  """Adds a network of your own, so that programs and studies find it by its name.

  A study's worker processes import the module that was started, so register there, at
  its top level, as with `methods.register`.

  Args:
    name: what `model` names in every configuration.
    factory: a Flax Linen module's class, or a function that returns a module, which is
      called as `module.apply(variables, images, train=...)` and returns logits. It is
      given `num_classes`; `method`, a `methods.Method`; `dtype`, `param_dtype`; and
      fields of `training.TrainConfig`, such as `depth` and `width`: each that it has a
      parameter for. A field without one has no effect, and is an error if it is set.
    title: its name for people; None: `name`.

  Raises:
    UsageError: another network has the name, a folder cannot have it, or the factory
      has no parameter `num_classes`.
  """
  check_name("model", name)
  if name in _KINDS:
    raise UsageError(f"name is {name!r}, which is that of another model.")
  if not callable(factory) or "num_classes" not in taken(factory):
    raise UsageError(
      f"factory of model {name!r} is {factory!r}: it must be a class or a function "
      "with a parameter num_classes."
    )
  title = name if title is None else title
  check_title("title of a model", title)
  _KINDS[name] = Kind(factory, title)
