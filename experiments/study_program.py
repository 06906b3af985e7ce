"""What the programs of studies share: their flags, run and report."""

from collections.abc import Callable

from absl import flags

from experiments import program
from skipinit_jax import studies

_WORKDIR = program.define_workdir("the runs, the results and the report")
_WORKERS = flags.DEFINE_integer(
  "workers",
  None,
  "Processes that share the runs of this machine. Default: one a core of a CPU; one "
  "on an accelerator, which runs a trial on each device.",
)
_DEVICES = flags.DEFINE_integer(
  "devices_per_trial",
  None,
  "Devices that a trial has. Default: one of an accelerator, all of a CPU.",
)
_STORAGE = flags.DEFINE_string(
  "storage",
  None,
  "URL of a database that machines share, such as "
  "postgresql+psycopg://user@host/database. Default: an SQLite file in the workdir.",
)
_STUDY_NAME = flags.DEFINE_string(
  "study_name",
  None,
  "Name of the study in the database. Default: that of the program.",
)


def run(make_study: Callable[[], studies.Study]) -> int:
  """Runs a study, writes its report and prints its main table.

  Args:
    make_study: returns the study of the program's flags.

  Returns:
    The exit status.
  """
  try:
    results = studies.run(
      make_study(),
      _WORKDIR.value,
      storage=_STORAGE.value,
      study_name=_STUDY_NAME.value,
      num_workers=_WORKERS.value,
      devices_per_trial=_DEVICES.value,
    )
  except studies.Interrupted:
    print("Interrupted and saved: the same command goes on from here.")
    return program.INTERRUPTED_STATUS
  page, *_ = studies.write_report(results, _WORKDIR.value)
  studies.print_accuracy(results)
  program.print_report(page)
  return 0
