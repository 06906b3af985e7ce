"""What decides a run's result beside its configuration: data and JAX's settings."""

from typing import Any

import jax

from skipinit_jax import data
from skipinit_jax.training.config import TrainConfig

# What decides random numbers, dtypes or the precision of products.
_JAX_SETTINGS = (
  "jax_default_matmul_precision",
  "jax_default_prng_impl",
  "jax_enable_custom_prng",
  "jax_enable_x64",
  "jax_numpy_dtype_promotion",
  "jax_random_seed_offset",
  "jax_threefry_partitionable",
)


def jax_settings() -> dict[str, Any]:
  """Returns the settings of JAX that decide a result, by name."""
  return {name: getattr(jax.config, name, None) for name in _JAX_SETTINGS}


def make_record(
  config: TrainConfig, dataset: data.Dataset | data.StreamedDataset
) -> dict[str, Any]:
  """Returns what a resumed run must agree with, beside `TrainConfig.identity`."""
  return {
    "data": dataset.record(),
    "jax": jax_settings(),
    "rate_factors": config.make_method().rate_factors,
  }
