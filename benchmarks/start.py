"""Measures how long a run takes to its first step, in a process of its own.

`python -m experiments.train` starts with an empty cache folder, where it leaves its
compiled programs and its decoded data, and then again with that folder. All times count
from before the process is there, by the clock on the wall. Most runs have marks at the
parts of the start, which cost microseconds, and end with their first step; to see that
the marks change nothing, one run a round is the program as it is, until the line of
progress that it prints after its first step. Files of the packages are warm: the
operating system has read them before. PyTorch is hidden from the program, because
tensorboardX imports it where it is installed, for seconds.

Example:
  python -m benchmarks.start
"""

import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from benchmarks import machine, tables
from experiments import program
from skipinit_jax.studies.names import network_name
from skipinit_jax.training import TrainConfig

_ROUNDS = flags.DEFINE_integer(
  "rounds", 1, "First and second starts of each network.", lower_bound=1
)

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIGS = (TrainConfig(depth=10, width=1), TrainConfig(depth=1000, width=1))
_FIRST_STEP = "first step"

# tensorboardX imports these where they are installed, for seconds. `make bench`
# installs the one, and an extra the other; a plain installation has neither.
_HIDE = """
import sys

class Hide:
  def find_spec(self, name, path=None, target=None):
    if name in ("torch", "google.cloud.storage"):
      raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hide())
"""
_PROGRAM = """
import runpy
runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
"""
# Runs experiments.train with marks, and prints them instead of taking a second step.
_MARKED_PROGRAM = """
import time
marks = [("interpreter", time.time())]

def mark(part):
  marks.append((part, time.time()))

import json, os
import jax
mark("import of JAX")
from experiments import program
from experiments.configs import train
from skipinit_jax.training import config, loop
mark("import of this package")
work = dict.fromkeys(("trace", "lower", "compile or read"), 0.0)
events = {
  "/jax/core/compile/jaxpr_trace_duration": "trace",
  "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
  "/jax/core/compile/backend_compile_duration": "compile or read",
}

def add(event, seconds, **_):
  if event in events:
    work[events[event]] += seconds

jax.monitoring.register_event_duration_secs_listener(add)
load_dataset = config.TrainConfig.load_dataset
Trainer = loop.Trainer

def marked_load(config):
  dataset = load_dataset(config)
  mark("flags, devices, data")
  return dataset

class MarkedTrainer(Trainer):
  def __init__(self, *args):
    mark("network, checkpoints")
    super().__init__(*args)
    mark("programs, first state")

  def train_steps(self, state, num_steps):
    mark("metrics, progress")
    jax.block_until_ready(super().train_steps(state, num_steps))
    mark("first step")
    print(json.dumps({"marks": marks, "programs": work}), flush=True)
    os._exit(0)

config.TrainConfig.load_dataset = marked_load
loop.Trainer = MarkedTrainer
"""


@dataclasses.dataclass(frozen=True)
class Start:
  """One start of the marked program.

  Attributes:
    parts: seconds of each part, in order; the last one is the first step.
    programs: seconds of tracing, lowering, and compiling or reading, of all threads,
      which work side by side.
  """

  parts: dict[str, float]
  programs: dict[str, float]

  @property
  def step_ends(self) -> float:
    """Seconds from before the process to the end of its first step."""
    return sum(self.parts.values())

  @property
  def step_starts(self) -> float:
    """Likewise to its start."""
    return self.step_ends - self.parts[_FIRST_STEP]


def parts_of(begin: float, marks: Sequence[tuple[str, float]]) -> dict[str, float]:
  """Returns the seconds of each part.

  Args:
    begin: when the first part began.
    marks: names of the parts, in order, and when each ended.
  """
  ends = [begin, *(end for _, end in marks)]
  names = [name for name, _ in marks]
  return {
    name: end - start
    for name, (start, end) in zip(names, itertools.pairwise(ends), strict=True)
  }


def marked_start(config: TrainConfig, cache: str) -> Start:
  """Starts the marked program and returns where the time went."""
  with tempfile.TemporaryDirectory() as workdir:
    begin = time.time()
    output = subprocess.run(
      _command(_HIDE + _MARKED_PROGRAM + _PROGRAM, config, workdir),
      cwd=_ROOT,
      env=_environment(cache),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      check=True,
    ).stdout
  result = json.loads(output)
  return Start(parts_of(begin, result["marks"]), result["programs"])


def plain_start(config: TrainConfig, cache: str) -> float:
  """Starts the program as it is; returns the seconds to the end of its first step."""
  with tempfile.TemporaryDirectory() as workdir:
    begin = time.time()
    with subprocess.Popen(
      _command(_HIDE + _PROGRAM, config, workdir),
      cwd=_ROOT,
      env=_environment(cache),
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
          seconds = time.time() - begin
          process.kill()
          break
      else:
        raise RuntimeError(f"It took no step:\n{''.join(seen)}")
  return seconds


def _command(program_text: str, config: TrainConfig, workdir: str) -> list[str]:
  return [
    *(sys.executable, "-c", program_text),
    f"--workdir={workdir}",
    f"--config.depth={config.depth}",
    f"--config.width={config.width}",
  ]


def _environment(cache: str) -> Mapping[str, str]:
  kept = {
    name: value
    for name, value in os.environ.items()
    if name != "JAX_COMPILATION_CACHE_DIR"
  }
  return {**kept, "XDG_CACHE_HOME": cache}


def measure(config: TrainConfig) -> dict[str, Any]:
  """Returns the times of first and second starts of one network."""
  first, second, plain = [], [], []
  for _ in range(_ROUNDS.value):
    with tempfile.TemporaryDirectory() as cache:
      first.append(marked_start(config, cache))
      second.append(marked_start(config, cache))
      plain.append(plain_start(config, cache))
  return {
    "network": network_name(config),
    "dataset": config.dataset,
    "batch_size": config.batch_size,
    "empty_cache": _summary(first),
    "filled_cache": _summary(second),
    "filled_cache_without_marks": {"seconds_to_end_of_step": machine.summary(plain)},
  }


def _summary(starts: Sequence[Start]) -> dict[str, Any]:
  return {
    "seconds_to_start_of_step": machine.summary([s.step_starts for s in starts]),
    "seconds_to_end_of_step": machine.summary([s.step_ends for s in starts]),
    "parts": _medians([start.parts for start in starts]),
    "programs_by_work": _medians([start.programs for start in starts]),
  }


def _medians(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
  return {
    name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]
  }


def main() -> None:
  """Prints tables to standard error, and one JSON object to standard output."""
  results = [measure(config) for config in _CONFIGS]
  tables.show("start", {"machine": machine.description(), "results": results})


if __name__ == "__main__":
  program.run(main)
