"""Puts the stable rates that curvature predicts beside those of a batch-size study.

It measures the curvature of each run's first loss, adds the rates that it allows to the
study's results.json, and makes the report again.

Example:
  python -m experiments.stable_rates --workdir=results/fashion_mnist_batch_size
"""

import sys

from experiments import program, study_program
from skipinit_jax import studies
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import batch_size


def main(workdir: str) -> None:
  """Predicts the rates, and writes and prints the report."""
  results = studies.read_results(workdir)
  if results.name != batch_size.KIND.name:
    raise UsageError(f"{workdir} has a {results.name}, not a {batch_size.KIND.name}.")
  results = batch_size.predict_rates(
    results, lambda title: print(f"Curvature: {title}", file=sys.stderr)
  )
  study_program.print_report(results, workdir)


if __name__ == "__main__":
  _WORKDIR = program.define_workdir("a finished batch-size study, or its results.json")
  program.run(lambda: main(_WORKDIR.value))
