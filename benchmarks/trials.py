"""Measures the trials an hour of a learning-rate search, by how it uses the cores.

Either one process trains a trial on all cores, or there are as many processes as cores.
Each of them has one thread, as by default, or as many threads as there are cores. Each
setting runs `experiments.depth_study` on some learning rates of two small networks. The
cache has the compiled programs, as in all of a search but its beginning. Trials an hour
are those of a long search, without the first trial of each process. From the command
on, to the end of the last trial, the start of the processes counts too.

Example:
  python -m benchmarks.trials
"""

import functools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from absl import flags

from benchmarks import benchmark
from skipinit_jax import studies
from skipinit_jax.cores import num_cores

_NETWORKS = ("wide_resnet", "residual_mlp")
_HIGHEST_RATE = 2.0**-5
# The rates of the first trials of all processes.
_NUM_FIRST = -(-num_cores() // len(_NETWORKS))

_ROUNDS = flags.DEFINE_integer(
  "rounds", 1, "Searches of each setting, which take turns.", lower_bound=1
)
_RATES = flags.DEFINE_integer(
  "rates",
  max(4, _NUM_FIRST + 1),
  "Learning rates of each network, from 2^-5 down.",
  lower_bound=_NUM_FIRST + 1,
)

_ROOT = pathlib.Path(__file__).parents[1]
_STUDY = (
  "experiments.depth_study",
  "--config=digits",
  "--config.methods=('skipinit',)",
  "--config.wide_resnet_depths=(16,)",
  "--config.residual_mlp_depths=(16,)",
)


class Setting(NamedTuple):
  """How a search uses the cores."""

  workers: int
  threads: int

  @property
  def name(self) -> str:
    """The setting in words."""
    name = f"{self.workers} x {self.threads} thread{'s' * (self.threads > 1)}"
    return name + ", the default" * (self == (num_cores(), 1))


class Searched(NamedTuple):
  """What one search took.

  Attributes:
    seconds: from the command to the end of the last trial.
    trial_seconds: each trial's, without those at the first rates. Each network has
      equally many.
  """

  seconds: float
  trial_seconds: list[float]


def search(setting: Setting, cache: str, num_rates: int) -> Searched:
  """Runs a search in a fresh workdir and with a cache of compiled programs."""
  rates = tuple(_HIGHEST_RATE / 2**index for index in range(num_rates))
  command = [sys.executable, "-m", *_STUDY, f"--workers={setting.workers}"]
  for network in _NETWORKS:
    flag = f"--config.{network}_search."
    command += [f"{flag}learning_rates={rates}", f"--noconfig.{network}_search.extend"]
    command += [f"{flag}num_seeds=1", f"{flag}best_of=1"]
  environment = {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": cache,
    # XLA:CPU has as many threads as this says, or else as there are cores.
    "NPROC": str(setting.threads),
  }
  with tempfile.TemporaryDirectory() as workdir:
    begin = time.time()
    done = subprocess.run(
      [*command, f"--workdir={workdir}"],
      cwd=_ROOT,
      env=environment,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    if done.returncode != 0:
      raise RuntimeError(f"The search failed:\n{done.stdout}")
    # A trial's last act is to write its result.
    paths = pathlib.Path(workdir, "trials").rglob("result.json")
    seconds = max(path.stat().st_mtime for path in paths) - begin
    runs = studies.read_results(workdir).runs
  assert len(runs) == len(_NETWORKS) * num_rates
  later = [run.seconds for run in runs if run.learning_rate in rates[_NUM_FIRST:]]
  return Searched(seconds, later)


def measure() -> dict[str, Any]:
  """Returns the JSON object."""
  cores = num_cores()
  settings = [Setting(1, cores), Setting(cores, cores), Setting(cores, 1)]
  num_trials = len(_NETWORKS) * _RATES.value
  with tempfile.TemporaryDirectory() as cache:
    # All run the same compiled programs: the rate is an argument of theirs.
    search(settings[0], cache, num_rates=1)
    ways = {
      setting: functools.partial(search, setting, cache, _RATES.value)
      for setting in settings
    }
    turns = benchmark.take_turns(ways, _ROUNDS.value)
  rows = []
  for setting, searches in turns.items():
    means = [statistics.fmean(each.trial_seconds) for each in searches]
    rows.append(
      {
        "processes": setting.name,
        "trials an hour": benchmark.summary(
          [3600 * setting.workers / each for each in means]
        ),
        "from the command on": benchmark.summary(
          [3600 * num_trials / each.seconds for each in searches]
        ),
      }
    )
  return {"trials_per_search": num_trials, "tables": {"trials": rows}}


if __name__ == "__main__":
  benchmark.run(measure)
