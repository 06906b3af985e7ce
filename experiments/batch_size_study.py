"""Measures accuracy, loss, optimal and largest stable rate by batch size and method.

Example:
  python -m experiments.batch_size_study --workdir=/tmp/study --config=digits
"""

from absl import flags

from experiments import program, study_program
from experiments.configs.batch_size_study import CONFIGS
from skipinit_jax import studies

# --help shows what this program and all studies share.
flags.adopt_module_key_flags(study_program)
_CONFIG = program.define_config(CONFIGS, default="digits")


def main() -> int:
  """Runs the program."""
  return study_program.run(lambda: studies.batch_size_study(_CONFIG.value))


if __name__ == "__main__":
  program.run(main)
