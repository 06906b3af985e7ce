"""Signal propagation in theory and in networks, and a verdict."""

from skipinit_jax.analysis import figures, measure, theory
from skipinit_jax.analysis.curvature import Sharpness, sharpness
from skipinit_jax.analysis.diagnose import (
  DISTANCE_LIMIT,
  FORWARD_LIMIT,
  GRADIENT_LIMIT,
  Diagnosis,
  Fault,
  diagnose,
  diagnose_functions,
  diagnose_signal,
)
from skipinit_jax.analysis.signal import Signal

__all__ = [
  "DISTANCE_LIMIT",
  "FORWARD_LIMIT",
  "GRADIENT_LIMIT",
  "Diagnosis",
  "Fault",
  "Sharpness",
  "Signal",
  "diagnose",
  "diagnose_functions",
  "diagnose_signal",
  "figures",
  "measure",
  "sharpness",
  "theory",
]
