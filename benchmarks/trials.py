"""Measures the trials an hour of a learning-rate search, by how it uses the cores.

Either one process trains a trial on all cores, or there are as many processes as cores.
Each of them has one thread, as by default, or as many threads as there are cores. Each
setting runs `experiments.depth_study` on some learning rates of two small networks. The
cache has the compiled programs of the first rate, as in all of a search but its
beginning. The settings take turns. Trials an hour are those of a long search, without
the first trial of each process. From the command on, to the end of the last trial, the
start of the processes counts too.

Example:
  python -m benchmarks.trials
"""

import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import flags

from benchmarks import machine, tables
from experiments import program
from skipinit_jax import studies
from skipinit_jax.cores import num_cores
from skipinit_jax.errors import UsageError

_ROUNDS = flags.DEFINE_integer(
  "rounds", 1, "Searches of each setting, which take turns.", lower_bound=1
)
_RATES = flags.DEFINE_integer(
  "rates", 4, "Learning rates of each network, from 2^-5 down.", lower_bound=2
)

_ROOT = pathlib.Path(__file__).parents[1]
_STUDY = (
  "experiments.depth_study",
  "--config=digits",
  "--config.methods=('skipinit',)",
  "--config.wide_resnet_depths=(16,)",
  "--config.residual_mlp_depths=(16,)",
)
_NETWORKS = ("wide_resnet", "residual_mlp")
_HIGHEST_RATE = 2.0**-5
# XLA:CPU has as many threads as this variable says, or else as there are cores.
_THREADS = "NPROC"


class Setting(NamedTuple):
  """How a search uses the cores: by default, or by its own number of both."""

  workers: int
  threads_per_worker: int
  is_default: bool = False


class Searched(NamedTuple):
  """What one search took.

  Attributes:
    seconds: from the command to the end of the last trial.
    trial_seconds: what each trial took, by network, without those at the first rates.
  """

  seconds: float
  trial_seconds: dict[str, list[float]]


def search(setting: Setting, num_rates: int, cache: str) -> Searched:
  """Runs a search in a fresh workdir."""
  rates = tuple(_HIGHEST_RATE / 2**index for index in range(num_rates))
  command = [sys.executable, "-m", *_STUDY]
  for network in _NETWORKS:
    flag = f"--config.{network}_search."
    command += [f"{flag}learning_rates={rates}", f"--noconfig.{network}_search.extend"]
    command += [f"{flag}num_seeds=1", f"{flag}best_of=1"]
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
  environment.pop(_THREADS, None)
  if not setting.is_default:
    command.append(f"--workers={setting.workers}")
    environment[_THREADS] = str(setting.threads_per_worker)
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
    results = studies.read_results(workdir)
  assert len(results.runs) == len(_NETWORKS) * num_rates
  rows = {found.name: found.row for found in results.searches}
  trial_seconds: dict[str, list[float]] = {row: [] for row in rows.values()}
  for run in results.runs:
    if run.learning_rate in rates[_num_first_rates() :]:
      trial_seconds[rows[run.search]].append(run.seconds)
  return Searched(seconds, trial_seconds)


def _num_first_rates() -> int:
  """Returns how many rates the first trials of all processes have."""
  return -(-num_cores() // len(_NETWORKS))


def _summary(setting: Setting, searches: Sequence[Searched]) -> dict[str, Any]:
  """Returns the trials an hour of workers that are never idle, and as it was."""
  num_trials = len(_NETWORKS) * _RATES.value
  means = [
    # Each network has equally many trials.
    statistics.fmean(map(statistics.fmean, each.trial_seconds.values()))
    for each in searches
  ]
  return {
    **setting._asdict(),
    "trials_per_hour": machine.summary(
      [3600 * setting.workers / mean for mean in means]
    ),
    "trials_per_hour_from_command": machine.summary(
      [3600 * num_trials / each.seconds for each in searches]
    ),
    "seconds_of_a_trial": {
      network: machine.summary(
        [seconds for each in searches for seconds in each.trial_seconds[network]]
      )
      for network in searches[0].trial_seconds
    },
  }


def main() -> None:
  """Prints a table to standard error, and one JSON object to standard output."""
  if _RATES.value <= _num_first_rates():
    raise UsageError(
      f"--rates is {_RATES.value}: on {num_cores()} cores it must be above "
      f"{_num_first_rates()}, which are the rates of the first trials."
    )
  cores = num_cores()
  settings = (Setting(1, cores), Setting(cores, cores), Setting(cores, 1, True))
  searches: dict[Setting, list[Searched]] = {each: [] for each in settings}
  with tempfile.TemporaryDirectory() as cache:
    # All run the same compiled programs.
    search(settings[0], 1, cache)
    for _ in range(_ROUNDS.value):
      for setting in settings:
        # What other rates add to the cache is left out: each search meets new rates.
        with tempfile.TemporaryDirectory() as copy:
          shutil.copytree(cache, copy, dirs_exist_ok=True)
          searches[setting].append(search(setting, _RATES.value, copy))
  tables.show(
    "trials",
    {
      "machine": machine.description(),
      "trials_per_search": len(_NETWORKS) * _RATES.value,
      "ways": [_summary(*each) for each in searches.items()],
    },
  )


if __name__ == "__main__":
  program.run(main)
