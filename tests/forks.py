"""Runs programs in forks of one process that has already imported what they need.

A program's imports cost it more than most tests let it compute. Each program still has
a process, flags and an exit status of its own. See `run_program` in conftest.py.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 300

# None of these starts a thread or one of JAX's backends, which no fork would survive.
# Programs themselves are not here, because each of them defines its flags.
_IMPORTED = (
  "grain",
  "matplotlib.pyplot",
  "ml_collections",
  "optuna",
  "orbax.checkpoint",
  "skipinit_jax.studies",
  "skipinit_jax.training",
  "tensorboardX",
  "tensorflow_datasets",
)


class Server:
  """The process that forks. It ends with the one that made it."""

  def __init__(self, environment: Mapping[str, str]) -> None:
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.forks"],
      cwd=ROOT,
      env=dict(environment),
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def run(
    self, arguments: list[str], environment: Mapping[str, str]
  ) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE FLAGS...`; killed by SIGALRM after `TIMEOUT_SECONDS`."""
    assert self._process.stdin and self._process.stdout
    with tempfile.TemporaryDirectory() as folder:
      paths = [str(Path(folder, name)) for name in ("stdout", "stderr")]
      request = {
        "arguments": arguments,
        "environment": dict(environment),
        "paths": paths,
      }
      print(json.dumps(request), file=self._process.stdin, flush=True)
      status = int(self._process.stdout.readline())
      output = [Path(path).read_text("utf-8", errors="replace") for path in paths]
    return subprocess.CompletedProcess(arguments, status, *output)

  def close(self) -> None:
    """Ends the process."""
    self._process.communicate()


def _serve() -> None:
  from skipinit_jax.training.metrics import hidden

  with hidden("torch"):
    for name in _IMPORTED:
      importlib.import_module(name)
  # JAX warns of every fork. Here no thread of it has started.
  warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)
  gc.freeze()
  for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
      _become(**request)
      return  # So that the process ends as every program does.
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)


def _become(
  arguments: list[str], environment: dict[str, str], paths: list[str]
) -> None:
  warnings.resetwarnings()
  os.environ.clear()
  os.environ.update(environment)
  write = os.O_WRONLY | os.O_CREAT
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for descriptor, path in enumerate(paths, start=1):
    os.dup2(os.open(path, write), descriptor)
  signal.alarm(TIMEOUT_SECONDS)
  sys.argv = arguments
  runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  _serve()
