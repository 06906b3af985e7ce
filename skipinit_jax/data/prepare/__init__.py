"""Turns the files of others into those that this package reads."""

from skipinit_jax.data.prepare import cifar, idx, imagenet, sample_photos

__all__ = [
  "cifar",
  "idx",
  "imagenet",
  "sample_photos",
]
