"""Measures test accuracy by depth and method, the paper's headline.

Example:
  python -m experiments.depth_study --workdir=/tmp/study --config=demo

The convolutional network of 1000 layers:
  python -m experiments.depth_study --workdir=/tmp/study --config=demo
    --config.wide_resnet_depths="(1000,)"
"""

from absl import flags

from experiments import program
from experiments.configs.depth_study import CONFIGS
from skipinit_jax import studies

_WORKDIR = program.define_workdir("the runs and the study's tables and figure")
_WORKERS = flags.DEFINE_integer(
  "workers",
  None,
  "Processes that share the runs. Default: one a core of a CPU, one on an accelerator.",
)
_CONFIG = program.define_config(CONFIGS, default="demo")


def main() -> int:
  """Runs the program."""
  workers = _WORKERS.value
  if workers is None:
    workers = studies.default_num_workers()
  try:
    study = studies.run(_CONFIG.value, _WORKDIR.value, num_workers=workers)
  except studies.Interrupted:
    print("Interrupted and saved: the same command goes on from here.")
    return program.INTERRUPTED_STATUS
  paths = studies.report.write(study, _WORKDIR.value)
  studies.report.print_table(study.cells)
  print("Results:", *paths)
  return 0


if __name__ == "__main__":
  program.run(main)
