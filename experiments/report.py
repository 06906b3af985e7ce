"""Makes the report of a finished study or run: tables, figures and one HTML page.

Examples:
  python -m experiments.report --workdir=/tmp/study --output=results/study
  python -m experiments.report --workdir=/tmp/run
  python -m experiments.report --workdir=/tmp/run --formats=tex,pdf
"""

from absl import flags

from experiments import program, study_program
from skipinit_jax import document, studies
from skipinit_jax.errors import UsageError

_WORKDIR = program.define_workdir(
  "a finished study, or its results.json alone, or of a run of experiments.train"
)
_OUTPUT = program.define_path(
  "output", "Directory to write the report into. Default: the workdir."
)
_FORMATS = flags.DEFINE_list(
  "formats",
  list(document.FORMATS),
  "Formats of the files beside report.html: md and tex for tables, png and pdf for "
  "figures.",
)


def main() -> None:
  """Runs the program."""
  workdir = _WORKDIR.value
  output = _OUTPUT.value or workdir
  if studies.is_run(workdir):
    page, *_ = studies.write_run_report(workdir, output, _FORMATS.value)
    studies.print_result(workdir)
    program.print_report(page)
  else:
    results = studies.read_results(workdir)
    try:
      study_program.print_report(results, output, _FORMATS.value)
    except UsageError:
      raise
    except (
      ArithmeticError,
      AssertionError,
      AttributeError,
      LookupError,
      TypeError,
      ValueError,
    ) as error:
      # It is not checked whether the numbers of a file belong together.
      raise UsageError(
        f"The results in {workdir} are of another version, or were changed "
        f"({type(error).__name__}: {error}): run the study's command again."
      ) from error


if __name__ == "__main__":
  program.run(main)
