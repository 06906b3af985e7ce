"""Studies: many runs, their statistics, tables and figures."""

from skipinit_jax.studies import report
from skipinit_jax.studies.depth import (
  Cell,
  DepthStudyConfig,
  Interrupted,
  run,
  summarize,
  trials,
)

__all__ = [
  "Cell",
  "DepthStudyConfig",
  "Interrupted",
  "report",
  "run",
  "summarize",
  "trials",
]
