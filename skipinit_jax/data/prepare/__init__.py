"""Turns the files of others into those that this package reads."""

from skipinit_jax.data.prepare import imagenet, published, sample_photos

__all__ = [
  "imagenet",
  "published",
  "sample_photos",
]
