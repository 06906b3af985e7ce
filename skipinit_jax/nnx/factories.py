"""Linen's factories of modules, as methods hold them, read as factories of NNX's."""

import dataclasses
import functools
from typing import Any

from flax import linen as nn
from flax import nnx

from skipinit_jax import layers as linen_layers
from skipinit_jax.errors import UsageError
from skipinit_jax.methods import ModuleFactory
from skipinit_jax.nnx import layers

_TWINS: dict[type[nn.Module], ModuleFactory] = {
  nn.Conv: nnx.Conv,
  nn.Dense: nnx.Linear,
  linen_layers.GhostBatchNorm: layers.GhostBatchNorm,
  linen_layers.LayerScale: layers.LayerScale,
  linen_layers.SkipInit: layers.SkipInit,
  linen_layers.WeightStandardizedConv: layers.WeightStandardizedConv,
  linen_layers.WeightStandardizedDense: layers.WeightStandardizedLinear,
}
# Flax 0.11 has no InstanceNorm in NNX.
_TWINS |= {
  getattr(nn, name): getattr(nnx, name)
  for name in ("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm")
  if hasattr(nnx, name)
}
FACTORIES = {
  "normalizer": ("nnx.LayerNorm", "num_features, rngs=rngs"),
  "last_normalizer": ("nnx.LayerNorm", "num_features, rngs=rngs"),
  "branch_scale": ("skipinit_jax.nnx.SkipInit", "rngs=rngs"),
  "conv": ("nnx.Conv", "in_features, out_features, kernel_size, strides, rngs=rngs"),
  "dense": ("nnx.Linear", "in_features, out_features, rngs=rngs"),
}
"""By a block's fields that are factories: an example, and what it is called with."""


def nnx_factory(field: str, factory: ModuleFactory | None) -> ModuleFactory | None:
  """Returns the factory of the NNX modules that a factory stands for.

  A method of the table holds Linen's, such as a `functools.partial` of
  `flax.linen.BatchNorm`; a factory of NNX modules is returned as it is.

  Args:
    field: the field that has the factory, for errors.
    factory: None returns None.

  Raises:
    UsageError: it is no factory, or one of Linen modules that have no twin in NNX.
  """
  if factory is None:
    return None
  example, arguments = FACTORIES[field]
  call = (
    f"a factory of NNX modules such as {example} or a functools.partial of it, called "
    f"as {field}({arguments})"
  )
  if isinstance(factory, functools.partial):
    kind: Any = factory.func
    twin: Any = nnx_factory(field, kind)
    if twin is kind:
      return factory
    # NNX's own first arguments are other ones: the numbers of features.
    names = [each.name for each in dataclasses.fields(kind)]
    keywords = dict(zip(names, factory.args, strict=False)) | factory.keywords
    return functools.partial(twin, **keywords)
  if isinstance(factory, nnx.Module | nn.Module):
    raise UsageError(
      f"{field} is a module, {type(factory).__name__}(...): it must be {call}."
    )
  if not callable(factory):
    raise UsageError(f"{field} is {factory!r}: it must be {call}.")
  if isinstance(factory, type) and issubclass(factory, nn.Module):
    if factory not in _TWINS:
      raise UsageError(
        f"{field} is {factory.__name__}, a Linen module that skipinit_jax.nnx knows no "
        f"twin of: it must be {call}."
      )
    return _TWINS[factory]
  return factory
