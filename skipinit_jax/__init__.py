"""Very deep residual networks, with and without normalization, in JAX and Flax.

What a network of one's own needs is here, and quick to import. The other modules are
imported by their names, such as `from skipinit_jax import training`: they load
checkpointing, data pipelines, searches or figures.
"""

import importlib.metadata

from skipinit_jax import layers, methods, models

__all__ = ["__version__", "layers", "methods", "models"]

try:
  __version__: str = importlib.metadata.version("skipinit_jax")
except importlib.metadata.PackageNotFoundError:
  # In a checkout that is not installed. The version stands in setup.py alone.
  __version__ = "unknown"
