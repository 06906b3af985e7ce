"""The machine that tests see: eight virtual CPU devices and a compilation cache."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent

# Kept between runs, in the checkout, and shared by workers and child processes.
# Entries that a killed process left unfinished are ignored by JAX, with a warning.
CACHE = {
  "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
}

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", CACHE["JAX_COMPILATION_CACHE_DIR"])
jax.config.update(
  "jax_persistent_cache_min_compile_time_secs",
  float(CACHE["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"]),
)


def program_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
  """Returns the environment of a child process, for `subprocess` and the like.

  Args:
    changes: variables to add or replace.

  Returns:
    This process's variables, less those that would change what JAX does, plus the
    CPU platform, the compilation cache and `changes`.
  """
  inherited = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_", "XLA_"))
  }
  return inherited | CACHE | {"JAX_PLATFORMS": "cpu"} | dict(changes or {})


@pytest.fixture(scope="session")
def child_environment() -> Callable[..., dict[str, str]]:
  """Returns `program_environment`, for tests that start processes of their own."""
  return program_environment


@pytest.fixture(scope="session")
def run_program() -> Callable[..., subprocess.CompletedProcess[str]]:
  """Runs `python -m MODULE FLAGS...` from the checkout and captures what it prints.

  `run_program(["experiments.train", "--workdir=..."], status=1)`. Any exit status is
  returned unless `status` names the one to expect. `env` adds variables, `timeout` is
  in seconds.
  """

  def run(
    arguments: list[str],
    *,
    env: Mapping[str, str] | None = None,
    status: int | None = None,
    timeout: float = 300,
  ) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
      [sys.executable, "-m", *arguments],
      cwd=ROOT,
      env=program_environment(env),
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=timeout,
    )
    if status is not None and result.returncode != status:
      pytest.fail(
        f"python -m {' '.join(arguments)} exited {result.returncode}, not {status}:\n"
        f"{result.stdout}{result.stderr}"
      )
    return result

  return run


@pytest.fixture(scope="session")
def start_program() -> Callable[..., subprocess.Popen[str]]:
  """Starts `python -m MODULE FLAGS...` and returns it while it runs, for signals."""

  def start(
    arguments: list[str], *, env: Mapping[str, str] | None = None
  ) -> subprocess.Popen[str]:
    return subprocess.Popen(
      [sys.executable, "-m", *arguments],
      cwd=ROOT,
      env=program_environment(env),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  return start
