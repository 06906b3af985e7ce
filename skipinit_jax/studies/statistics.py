"""Statistics of runs."""

import math

import numpy as np


def chance(labels: np.ndarray) -> float:
  """Returns the share of the most frequent label: [N] int."""
  return float(np.bincount(labels).max() / len(labels))


def above_chance(labels: np.ndarray) -> float:
  """Returns the accuracy above which a network has learned something.

  It is chance plus three standard errors of a share over these labels.

  Args:
    labels: of the test set, [N] int.
  """
  share = chance(labels)
  return share + 3 * math.sqrt(share * (1 - share) / len(labels))
