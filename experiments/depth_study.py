r"""Measures test accuracy and the best learning rate by depth and method.

Example:
  python -m experiments.depth_study --workdir=/tmp/study --config=demo

The convolutional network of 1000 layers:
  python -m experiments.depth_study --workdir=/tmp/study --config=demo \
    --config.wide_resnet_depths="(1000,)"
"""

from absl import flags

from experiments import program, study_program
from experiments.configs.depth_study import CONFIGS
from skipinit_jax import studies

# --help shows what this program and all studies share.
flags.adopt_module_key_flags(study_program)
_CONFIG = program.define_config(CONFIGS, default="demo")


def main() -> int:
  """Runs the program."""
  return study_program.run(lambda: studies.depth_study(_CONFIG.value))


if __name__ == "__main__":
  program.run(main)
