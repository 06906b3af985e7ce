r"""Trains ResNet-50 on ImageNet by method and batch size, beside the published table.

One method at one batch size, or with no flags but --workdir the whole table:
  python -m experiments.imagenet --workdir=/tmp/imagenet \
    --config.methods="('regularized_skipinit',)" --config.batch_sizes="(1024,)"

Every run has all devices of all hosts; start the same command on each host. Cloud TPU
slices and Slurm steps find each other, other hosts need the three flags below.
"""

from experiments import program
from experiments.configs.imagenet import CONFIGS
from skipinit_jax import studies
from skipinit_jax.training import distributed

_WORKDIR = program.define_workdir(
  "the runs, the results and the report", in_bucket=True
)
_CONFIG = program.define_config(CONFIGS, default="imagenet2012")
_join_processes = program.define_processes()


def main() -> int:
  """Runs the program."""
  _join_processes()
  workdir = _WORKDIR.value
  try:
    results = studies.run_in_turn(studies.imagenet_study(_CONFIG.value), workdir)
  except studies.Interrupted:
    if distributed.is_first():
      print("Interrupted and saved: the same command goes on from here.")
    return program.INTERRUPTED_STATUS
  if distributed.is_first():
    page, *_ = studies.write_report(results, workdir)
    studies.print_accuracy(results)
    program.print_report(page)
  return 0


if __name__ == "__main__":
  program.run(main)
