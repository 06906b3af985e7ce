"""Models the time of a training step on 1 to 1024 TPUs or GPUs, batch norm or not.

The costs of a step come from the program that XLA compiles for TPU v5e, which is done
without a TPU; the time comes from `benchmarks.scaling_model`. docs/scaling.md explains
both and has the tables.

Tables and figures from the costs in results/scaling/costs.json:
  python -m benchmarks.scaling --workdir=results/scaling

The costs that the file lacks, in minutes each, with libtpu of jax[tpu]'s version:
  python -m benchmarks.scaling --workdir=results/scaling --count
"""

import pathlib

from absl import flags

from benchmarks import scaling_report
from experiments import program
from skipinit_jax import document
from skipinit_jax.files import write_json

_WORKDIR = program.define_workdir("costs.json, scaling.json, tables, figures, report")
_COUNT = flags.DEFINE_bool(
  "count",
  False,
  "Compile the steps that costs.json lacks, for TPU v5e, and add their costs to it.",
)


def main() -> None:
  """Runs the program."""
  workdir = pathlib.Path(_WORKDIR.value)
  if _COUNT.value:
    scaling_report.count_missing(workdir)
  costs = scaling_report.read_costs(workdir)
  report = scaling_report.make_document(costs)
  page, *_ = document.write(report, workdir)
  write_json(workdir / "scaling.json", scaling_report.numbers(costs))
  print((workdir / "scaling.json").read_text(encoding="utf-8"), end="")
  document.print_findings(report.findings)
  program.print_report(page)


if __name__ == "__main__":
  program.run(main)
