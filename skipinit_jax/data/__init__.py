"""Data sets and augmentation, and pipelines for sets in memory and in files."""

from skipinit_jax.data import augmentation, image_folder, in_memory, prepare, streaming
from skipinit_jax.data.datasets import (
  NAMES,
  PREPARED_NAMES,
  STREAMED_NAMES,
  Dataset,
  Split,
  is_streamed,
  known_names,
  load,
  register,
  title,
)
from skipinit_jax.data.streaming import StreamedDataset, StreamedSplit

__all__ = [
  "NAMES",
  "PREPARED_NAMES",
  "STREAMED_NAMES",
  "Dataset",
  "Split",
  "StreamedDataset",
  "StreamedSplit",
  "augmentation",
  "image_folder",
  "in_memory",
  "is_streamed",
  "known_names",
  "load",
  "prepare",
  "register",
  "streaming",
  "title",
]
