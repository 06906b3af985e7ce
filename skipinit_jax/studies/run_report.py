"""Reports of single training runs: from a run's workdir to a `Document`."""

import os
import shlex
from collections.abc import Collection

from skipinit_jax import data, document, methods
from skipinit_jax.document import Document, Entry, Figure, Section, Table
from skipinit_jax.errors import UsageError
from skipinit_jax.files import (
  CHECKPOINTS,
  METRICS,
  RESULT,
  Path,
  as_type,
  local_path,
  reading_record,
)
from skipinit_jax.studies import figures
from skipinit_jax.studies.formatting import format_rate
from skipinit_jax.studies.history import make_history, read_signal
from skipinit_jax.studies.report import signal_figures
from skipinit_jax.training import Result, TrainConfig
from skipinit_jax.training.metrics import read_metrics, warn_of_lost_epochs


def is_run(workdir: str | os.PathLike[str]) -> bool:
  """Tells whether a directory is the workdir of one training run, finished or not."""
  return any(
    os.path.exists(local_path(workdir) / name)
    for name in (RESULT, METRICS, CHECKPOINTS)
  )


def read_result(workdir: str | os.PathLike[str]) -> Result:
  """Reads the result of a run that has ended.

  Raises:
    UsageError: the run is not finished, or its result is of another version.
  """
  path = local_path(workdir) / RESULT
  result = None
  if path.exists():
    with reading_record(path) as fields:
      result = as_type(Result, fields)
      as_type(TrainConfig, result.config)
  if result is None or result.status == "interrupted":
    raise UsageError(
      f"The run in {workdir} is not finished: run the same command again to go on, "
      "then make the report."
    )
  return result


def result_table(result: Result) -> Table:
  """Returns what a run came to as a table."""
  completed = result.status == "completed"
  rows: list[tuple[str, str | Entry]] = [
    ("status", "completed" if completed else Entry("diverged", "bad")),
    ("steps", str(result.step)),
    ("test accuracy (%)", _format(result.test_accuracy, ".2f", 100)),
    ("test loss", _format(result.test_loss, ".4f")),
    ("training accuracy (%)", _format(result.train_accuracy, ".2f", 100)),
    ("training loss", _format(result.train_loss, ".4f")),
    ("training images per second", _format(result.images_per_second, ".0f")),
    ("seconds to the first step", _format(result.seconds_to_first_step, ".1f")),
    ("parameters", str(result.num_parameters)),
  ]
  return Table(
    name="result",
    title="What the run came to",
    header=["quantity", "value"],
    rows=rows,
    note="Training loss and accuracy are means over the last epoch, as trained on.",
  )


def make_run_report(workdir: str | os.PathLike[str], command: str) -> Document:
  """Returns the report of a run, which the command made: result, curves and signal.

  Raises:
    UsageError: the run is not finished, or a file of it is damaged.
  """
  result = read_result(workdir)
  rows = read_metrics(workdir)
  history = make_history(rows)
  config = TrainConfig(**result.config)
  if result.status == "completed" and rows:
    warn_of_lost_epochs(workdir, rows, config.epochs)
  title = f"{config.network_title}, {methods.get(config.method).title}"
  ended = (
    f"Test accuracy {_format(result.test_accuracy, '.2f', 100)} % after"
    if result.status == "completed"
    else "Diverged: a loss, gradient or parameter is not finite after"
  )
  sections = [
    Section("Result", "", [result_table(result)]),
    Section(
      "Learning curves",
      "",
      [
        Figure(
          name="learning_curves",
          title="Loss and accuracy by epoch",
          figure=figures.run_curves(history),
          description="Two panels by epoch, loss and accuracy, a line each for "
          "training and test set.",
          note="On the training set they are means over an epoch's steps, as trained "
          "on: augmented, with dropout, and while the network changes.",
        )
      ],
    ),
  ]
  signal = read_signal(history)
  if signal:
    maps = signal_figures("signal", "Signal by block and step", {title: signal})
    sections.append(Section("Signal during training", "", maps))
  if result.environment:
    environment = Table(
      name="environment",
      title="How the run was made",
      header=["what", "value"],
      rows=[*result.environment.items()],
      note="Device, versions and all settings are at the end of the page.",
    )
    sections.append(Section("The run's record", "", [environment]))
  return Document(
    title=title,
    lead=f"One training run on {data.title(config.dataset)}, at a highest learning "
    f"rate of {format_rate(config.learning_rate)}. {ended} {result.step} steps.",
    findings=[],
    sections=sections,
    config=result.config,
    versions=result.versions,
    device=result.device,
    command=command,
  )


def write_run_report(
  workdir: str | os.PathLike[str],
  directory: str | os.PathLike[str],
  formats: Collection[str] = document.FORMATS,
) -> list[Path]:
  """Writes `report.html` and the files of all tables and figures of a run.

  The directory is made if it does not exist.

  Returns:
    The files, `report.html` first.

  Raises:
    UsageError: the run is not finished, a format is unknown, or the directory cannot be
      written.
  """
  arguments = ["python", "-m", "experiments.report", f"--workdir={workdir}"]
  if local_path(directory) != local_path(workdir):
    arguments.append(f"--output={directory}")
  report = make_run_report(workdir, shlex.join(arguments))
  return document.write(report, directory, formats)


def print_result(workdir: str | os.PathLike[str]) -> None:
  """Prints the result of a finished run to standard output.

  Raises:
    UsageError: the run is not finished.
  """
  document.print_table(result_table(read_result(workdir)))


def _format(value: float | None, how: str, factor: float = 1.0) -> str:
  return "none" if value is None else format(factor * value, how)
