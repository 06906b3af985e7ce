"""Shows that trainings which look different are the same, and where that ends.

Divided parameters at a multiplied rate:
  python -m experiments.equivalence --workdir=/tmp/reparameterization

Batch norm with weight decay, and without it at an exponentially growing rate:
  python -m experiments.equivalence --workdir=/tmp/weight_decay --config=weight_decay
"""

import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from experiments import program
from experiments.configs.equivalence import CONFIGS, EquivalenceConfig
from experiments.equivalences.common import Outcome
from experiments.equivalences.reparameterization import run_reparameterization
from experiments.equivalences.weight_decay import run_weight_decay
from skipinit_jax import document
from skipinit_jax.files import write_json

_WORKDIR = program.define_workdir("equivalence.json, the figures, tables and report")
_CONFIG = program.define_config(CONFIGS, default="reparameterization")


def main() -> None:
  """Runs the program."""
  config, workdir = _CONFIG.value, _WORKDIR.value
  outcome = run(config)
  page, *_ = document.write(_report(config, outcome), workdir)
  write_json(
    pathlib.Path(workdir, "equivalence.json"),
    {"config": dataclasses.asdict(config), **outcome.numbers},
  )
  document.print_table(outcome.summary)
  document.print_findings(outcome.findings)
  program.print_report(page)


def run(config: EquivalenceConfig) -> Outcome:
  """Runs the experiment of a configuration.

  Args:
    config: the experiment and its network.

  Returns:
    What it found.

  Raises:
    UsageError: a field's value is not allowed.
  """
  config.validate()
  # Both precisions then train the same numbers, and rho belongs to them.
  learning_rate, momentum, l2 = (
    float(np.float32(value))
    for value in (config.learning_rate, config.momentum, config.l2)
  )
  config = dataclasses.replace(
    config, learning_rate=learning_rate, momentum=momentum, l2=l2
  )
  experiments: dict[str, Callable[[EquivalenceConfig], Outcome]] = {
    "reparameterization": run_reparameterization,
    "weight_decay": run_weight_decay,
  }
  return experiments[config.experiment](config)


def _report(config: EquivalenceConfig, outcome: Outcome) -> document.Document:
  return document.Document(
    title=outcome.title,
    lead=outcome.lead,
    findings=outcome.findings,
    sections=outcome.sections,
    config=dataclasses.asdict(config),
    versions={
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "flax", "optax", "numpy")
    },
    device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    command=document.command_line(),
  )


if __name__ == "__main__":
  program.run(main)
