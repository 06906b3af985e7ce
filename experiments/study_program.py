"""What the programs of studies share: their flags, run and report."""

import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, TypeVar

from absl import flags

from experiments import program
from skipinit_jax import document, studies
from skipinit_jax.training import distributed

Config = TypeVar("Config")

# The flags defined here belong to the programs, whose --help shows them.
flags.disclaim_key_flags()


def search(
  rates: tuple[float, ...],
  *,
  min_rate: float,
  max_rate: float,
  num_seeds: int = 2,
) -> studies.SearchConfig:
  """Returns a search for two cores: over the best two of a few seeds."""
  return studies.SearchConfig(
    learning_rates=rates,
    min_learning_rate=min_rate,
    max_learning_rate=max_rate,
    num_seeds=num_seeds,
    best_of=2,
  )


def print_report(
  results: studies.StudyResults[Any],
  directory: str,
  formats: Collection[str] = document.FORMATS,
) -> None:
  """Writes a study's report, prints its main table and says where the report is."""
  page, *_ = studies.write_report(results, directory, formats)
  studies.print_accuracy(results)
  program.print_report(page)


@dataclasses.dataclass(frozen=True)
class StudyProgram(program.Program, Generic[Config]):
  """A program that runs a study, writes its report and prints its main table.

  Attributes:
    make_study: returns the study of a configuration.
    configs: the configurations by name, all of one dataclass.
    default: the name of the one to use without --config.
    one_by_one: whether each run has all devices of all hosts, one run after another.
      Otherwise runs go side by side, and machines may share the study.
    finish: takes the results and the workdir; writes and prints what they say.
  """

  make_study: Callable[[Config], studies.Study[Any]]
  configs: Mapping[str, Callable[[], Config]]
  default: str
  one_by_one: bool = False
  finish: Callable[[studies.StudyResults[Any], str], None] = print_report

  def define_flags(self) -> Callable[[], int]:
    """Defines the flags that all studies share, and --config."""
    workdir = program.define_workdir(
      "the runs, the results and the report", in_bucket=self.one_by_one
    )
    config = program.define_config(self.configs, self.default)
    dry_run = flags.DEFINE_boolean(
      "dry_run", False, "Whether only to say how many runs there are and how long."
    )
    run = _define_one_by_one() if self.one_by_one else _define_side_by_side()

    def main() -> int:
      if dry_run.value:
        document.print_table(studies.plan_table(self.make_study(config.value)))
        return 0
      try:
        results = run(lambda: self.make_study(config.value), workdir.value)
      except studies.Interrupted as error:
        # A lost database has its own sentence.
        if str(error):
          print(f"error: {error}", file=sys.stderr)
        elif distributed.is_first():
          print("Interrupted and saved: the same command goes on from here.")
        return program.INTERRUPTED_STATUS
      if distributed.is_first():
        self.finish(results, workdir.value)
      return 0

    return main


_Run = Callable[[Callable[[], studies.Study[Any]], str], studies.StudyResults[Any]]


def _define_side_by_side() -> _Run:
  workers = flags.DEFINE_integer(
    "workers",
    None,
    "Processes that share the runs of this machine. Default: one a core of a CPU; one "
    "on an accelerator, which runs a trial on each device.",
  )
  devices = flags.DEFINE_integer(
    "devices_per_trial",
    None,
    "Devices that a trial has. Default: one of an accelerator, all of a CPU.",
  )
  storage = flags.DEFINE_string(
    "storage",
    None,
    "URL of a database that machines share, such as "
    "postgresql+psycopg://user@host/database. Default: an SQLite file in the workdir.",
  )
  study_name = flags.DEFINE_string(
    "study_name",
    None,
    "Name of the study in the database. Default: that of the program.",
  )
  return lambda make_study, workdir: studies.run(
    make_study(),
    workdir,
    storage=storage.value,
    study_name=study_name.value,
    num_workers=workers.value,
    devices_per_trial=devices.value,
  )


def _define_one_by_one() -> _Run:
  join_processes = program.define_processes()

  def run(
    make_study: Callable[[], studies.Study[Any]], workdir: str
  ) -> studies.StudyResults[Any]:
    # Before the study is made: nothing else of JAX may come first.
    join_processes()
    return studies.run_sequentially(make_study(), workdir)

  return run
