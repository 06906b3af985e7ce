"""The machine that tests see: eight virtual CPU devices and a compilation cache."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata

import pytest

from tests import forks

ROOT = forks.ROOT

MACHINE = {
  # `benchmarks.accelerator` runs some tests on a GPU.
  "JAX_PLATFORMS": os.environ.get("TEST_PLATFORMS", "cpu"),
  # Kept between runs, in the checkout, and shared by workers and child processes.
  # Entries that a killed process left unfinished are ignored by JAX, with a warning.
  "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
  # LLVM's passes are most of what short programs would wait for. Its lowest level but
  # none still draws numbers fast.
  "XLA_FLAGS": "--xla_backend_optimization_level=1",
}
if metadata.version("jaxlib").startswith("0.10."):
  # Networks of tests run once or twice: they compile in half the time without LLVM's
  # passes and MLIR's fusions. An XLA that does not know a flag ends the process.
  MACHINE["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
  )
# JAX reads its variables when it is imported; processes that tests start inherit them.
assert "jax" not in sys.modules
os.environ.update(MACHINE)
import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
  """Spares the garbage collector what was imported: it stays until the end."""
  gc.collect()
  gc.freeze()


def program_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
  """Returns the environment of a child process, for `subprocess` and the like.

  Args:
    changes: variables to add or replace.

  Returns:
    This process's variables, but with one CPU device, and `changes`.
  """
  inherited = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_", "XLA_"))
  }
  return inherited | MACHINE | dict(changes or {})


@pytest.fixture(scope="session")
def child_environment() -> Callable[..., dict[str, str]]:
  """Returns `program_environment`, for tests that start processes of their own."""
  return program_environment


@pytest.fixture(scope="session")
def fork_server() -> Iterator[forks.Server]:
  """The process that `run_program` forks."""
  server = forks.Server(program_environment())
  yield server
  server.close()


@pytest.fixture(scope="session")
def run_program(fork_server) -> Callable[..., subprocess.CompletedProcess[str]]:
  """Runs `python -m MODULE FLAGS...` from the checkout and captures what it prints.

  `run_program(["experiments.train", "--workdir=..."], status=1)`. Any exit status is
  returned unless `status` names the one to expect. `env` adds variables. The program is
  a fork, unless it needs variables that Python or JAX read when they start.
  """

  def run(
    arguments: list[str],
    *,
    env: Mapping[str, str] | None = None,
    status: int | None = None,
  ) -> subprocess.CompletedProcess[str]:
    environment = program_environment(env)
    if any(name.startswith(("JAX_", "XLA_", "PYTHON")) for name in env or ()):
      result = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=forks.TIMEOUT_SECONDS,
      )
    else:
      result = fork_server.run(arguments, environment)
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
