"""Very deep residual networks, with and without normalization, in JAX and Flax."""

from skipinit_jax import layers, methods, models

__all__ = ["layers", "methods", "models"]
