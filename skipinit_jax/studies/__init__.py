"""Studies: many runs, their statistics, tables and figures."""

from skipinit_jax.studies import report
from skipinit_jax.studies.depth import (
  Cell,
  DepthStudy,
  DepthStudyConfig,
  run,
  summarize,
  trial_configs,
)
from skipinit_jax.studies.trials import Interrupted, default_num_workers

__all__ = [
  "Cell",
  "DepthStudy",
  "DepthStudyConfig",
  "Interrupted",
  "default_num_workers",
  "report",
  "run",
  "summarize",
  "trial_configs",
]
