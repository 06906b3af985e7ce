"""Measures accuracy by the scalar at the end of each branch, learnable or constant.

Example:
  python -m experiments.branch_scale_study --workdir=/tmp/study --config=batch_norm
"""

from absl import flags

from experiments import program, study_program
from experiments.configs.branch_scale_study import CONFIGS
from skipinit_jax import studies

# --help shows what this program and all studies share.
flags.adopt_module_key_flags(study_program)
_CONFIG = program.define_config(CONFIGS, default="batch_norm")


def main() -> int:
  """Runs the program."""
  return study_program.run(lambda: studies.branch_scale_study(_CONFIG.value))


if __name__ == "__main__":
  program.run(main)
