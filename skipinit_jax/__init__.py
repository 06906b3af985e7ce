"""Very deep residual networks, with and without normalization, in JAX and Flax.

Modules load when they are first used, as `skipinit_jax.models` or by an import of their
own. The core has `layers`, `models`, `nnx`, `methods`, `analysis` and `convert`; others
need an extra, and say which: `pip install 'skipinit_jax[train]'`.
"""

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from skipinit_jax import analysis as analysis
  from skipinit_jax import compilation as compilation
  from skipinit_jax import convert as convert
  from skipinit_jax import data as data
  from skipinit_jax import document as document
  from skipinit_jax import errors as errors
  from skipinit_jax import export as export
  from skipinit_jax import layers as layers
  from skipinit_jax import methods as methods
  from skipinit_jax import models as models
  from skipinit_jax import nnx as nnx
  from skipinit_jax import studies as studies
  from skipinit_jax import training as training

__all__ = ["__version__", "layers", "methods", "models"]

try:
  __version__: str = importlib.metadata.version("skipinit_jax")
except importlib.metadata.PackageNotFoundError:
  # In a checkout that is not installed. The version stands in setup.py alone.
  __version__ = "unknown"


def __getattr__(name: str) -> Any:
  # Tools ask for names with underscores, such as __path__: no module of ours has one.
  if name.startswith("_") or not importlib.util.find_spec(f"{__name__}.{name}"):
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return importlib.import_module(f"{__name__}.{name}")
