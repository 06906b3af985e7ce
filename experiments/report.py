"""Makes the report of a finished study: tables, figures and one HTML page.

Example:
  python -m experiments.report --workdir=/tmp/study --output=results/study
"""

import os

from absl import flags

from experiments import program
from skipinit_jax import studies

_WORKDIR = program.define_workdir("a finished study, or its results.json alone")
_OUTPUT = flags.DEFINE_string(
  "output", None, "Directory to write the report into. Default: the workdir."
)


def main() -> int:
  """Runs the program."""
  results = studies.read_results(_WORKDIR.value)
  output = os.path.expanduser(_OUTPUT.value or _WORKDIR.value)
  page, *_ = studies.write_report(results, output)
  studies.print_accuracy(results)
  print(f"Report: {page}, with its tables and figures as files beside it.")
  return 0


if __name__ == "__main__":
  program.run(main)
