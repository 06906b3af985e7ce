"""Data sets, augmentation, and pipelines for sets that live on the device."""

from skipinit_jax.data import augmentation, idx, in_memory
from skipinit_jax.data.datasets import NAMES, Dataset, Split, load

__all__ = [
  "NAMES",
  "Dataset",
  "Split",
  "augmentation",
  "idx",
  "in_memory",
  "load",
]
