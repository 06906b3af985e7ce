"""What decides a run's result beside its configuration, and how it was made."""

import functools
import pathlib
import platform
import subprocess
from typing import Any

import jax

from skipinit_jax import data
from skipinit_jax.training.config import TrainConfig

_GIT_SECONDS = 10.0
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


def environment(command: str | None) -> dict[str, str]:
  """Returns how a run is made, in words: command, commit, Python and system.

  What is not known is left out.

  Args:
    command: the command that makes it.
  """
  known = {
    "command": command,
    "commit": _commit(),
    "python": platform.python_version(),
    "system": platform.platform(),
  }
  return {name: value for name, value in known.items() if value}


@functools.cache
def _commit() -> str:
  """Returns the commit of the checkout that runs, and whether it was changed since."""
  folder = pathlib.Path(__file__).parent

  def git(*arguments: str) -> str:
    done = subprocess.run(
      ["git", *arguments],
      cwd=folder,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      check=True,
      text=True,
      timeout=_GIT_SECONDS,
    )
    return done.stdout.strip()

  try:
    # An installed package may lie in another project's checkout.
    git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
  except (OSError, subprocess.SubprocessError):
    return ""


def make_record(
  config: TrainConfig, dataset: data.Dataset | data.StreamedDataset
) -> dict[str, Any]:
  """Returns what a resumed run must agree with, beside `TrainConfig.identity`."""
  return {
    "data": dataset.record(),
    "jax": jax_settings(),
    "rate_factors": config.make_method().rate_factors,
  }
