"""Measures how long a run takes to its first step, in a process of its own.

`python -m experiments.train` starts with an empty cache folder, where it leaves its
compiled programs and its decoded data, and then again with that folder. The seconds
count from before the process is there until it prints the progress of its first step.
Files of the packages are warm: the operating system has read them before.

Example:
  python -m benchmarks.start
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import flags

from benchmarks import benchmark
from skipinit_jax.training import TrainConfig

_ROUNDS = flags.DEFINE_integer(
  "rounds", 1, "First and second starts of each network.", lower_bound=1
)

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIGS = (TrainConfig(depth=10, width=1), TrainConfig(depth=1000, width=1))
# The writer of events imports two packages where they are installed, for seconds. A
# plain installation has neither: they are not found. SciPy does not bear a None in
# `sys.modules` in their place.
_PROGRAM = """
import runpy, sys

class Absent:
  @staticmethod
  def find_spec(name, path=None, target=None):
    if name in ("torch", "google.cloud.storage"):
      raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent)
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""


def seconds_to_first_step(config: TrainConfig, cache: str) -> float:
  """Starts the program, ends it after its first step, and returns the seconds.

  Args:
    config: the run; its network is all that matters.
  """
  environment = {**os.environ, "XDG_CACHE_HOME": cache}
  environment.pop("JAX_COMPILATION_CACHE_DIR", None)
  with tempfile.TemporaryDirectory() as workdir:
    begin = time.perf_counter()
    with subprocess.Popen(
      [
        *(sys.executable, "-c", _PROGRAM, f"--workdir={workdir}"),
        *(f"--config.depth={config.depth}", f"--config.width={config.width}"),
      ],
      cwd=_ROOT,
      env=environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    ) as process:
      assert process.stderr is not None
      seen = []
      for line in process.stderr:
        seen.append(line)
        if line.startswith("step 1/"):
          seconds = time.perf_counter() - begin
          process.kill()
          return seconds
  raise RuntimeError(f"It took no step:\n{''.join(seen)}")


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  rows = []
  for config in _CONFIGS:
    seconds: dict[str, list[float]] = {"empty cache": [], "filled cache": []}
    for _ in range(_ROUNDS.value):
      with tempfile.TemporaryDirectory() as cache:
        for state in seconds:
          seconds[state].append(seconds_to_first_step(config, cache))
    for state, each in seconds.items():
      name = f"{config.network_title}, {state}"
      rows.append(
        {"network": name, "seconds to the first step": benchmark.summary(each)}
      )
  return {"tables": {"start": rows}}


if __name__ == "__main__":
  benchmark.run(measure)
