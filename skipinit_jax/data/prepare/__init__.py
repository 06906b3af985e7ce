"""Turns the files of others into those that this package reads."""

from skipinit_jax.data.prepare import idx, sample_photos

__all__ = [
  "idx",
  "sample_photos",
]
