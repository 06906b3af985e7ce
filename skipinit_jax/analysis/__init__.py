"""Signal propagation in theory and in networks, and a verdict."""

from skipinit_jax.analysis import figures, measure, theory
from skipinit_jax.analysis.curvature import Sharpness, sharpness
from skipinit_jax.analysis.diagnose import (
  ADAM_LIMIT,
  ADAM_POSITION_LIMIT,
  ADAM_SPREAD_LIMIT,
  DISTANCE_LIMIT,
  FORWARD_LIMIT,
  GRADIENT_LIMIT,
  POSITION_LIMIT,
  SPREAD_LIMIT,
  Diagnosis,
  Fault,
  diagnose,
  diagnose_functions,
  diagnose_signal,
)
from skipinit_jax.analysis.repair import Change, Repair, Target, repair
from skipinit_jax.analysis.signal import Signal

__all__ = [
  "ADAM_LIMIT",
  "ADAM_POSITION_LIMIT",
  "ADAM_SPREAD_LIMIT",
  "DISTANCE_LIMIT",
  "FORWARD_LIMIT",
  "GRADIENT_LIMIT",
  "POSITION_LIMIT",
  "SPREAD_LIMIT",
  "Change",
  "Diagnosis",
  "Fault",
  "Repair",
  "Sharpness",
  "Signal",
  "Target",
  "diagnose",
  "diagnose_functions",
  "diagnose_signal",
  "figures",
  "measure",
  "repair",
  "sharpness",
  "theory",
]
