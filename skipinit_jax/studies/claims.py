"""What the claims of several studies share: differences, verdicts and their words.

A verdict is True where the results agree with a claim, False where they do not, and
None where they cannot tell.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from skipinit_jax.document import Finding
from skipinit_jax.studies.formatting import format_accuracy
from skipinit_jax.studies.study import SearchResult


class Points(NamedTuple):
  """An accuracy, or a difference of accuracies, in percentage points.

  Attributes:
    value: the points.
    error: their deviation, of a difference the root of the sum of both squared
      deviations; None: unknown.
  """

  value: float
  error: float | None

  @classmethod
  def of(cls, search: SearchResult[Any]) -> "Points":
    """Returns the test accuracy of a search that completed."""
    accuracy, deviation = search.test_accuracy, search.test_accuracy_deviation
    assert accuracy is not None
    return cls(100 * accuracy, None if deviation is None else 100 * deviation)

  def __sub__(self, other: "Points") -> "Points":
    error = None
    if self.error is not None and other.error is not None:
      error = math.hypot(self.error, other.error)
    return Points(self.value - other.value, error)

  def __str__(self) -> str:
    error = "" if self.error is None else f"±{self.error:.1f}"
    # The sign of what rounds to zero means nothing.
    return f"{round(self.value, 1) + 0.0:+.1f}{error}"

  def is_at_least(self, bound: float) -> bool | None:
    """Returns whether a difference is at least a bound, by two of its deviations."""
    if self.error is None:
      return None
    if self.value + 2 * self.error < bound:
      return False
    # A difference less certain than the bound itself shows nothing, unless far above.
    is_certain = self.error <= abs(bound) or self.value - 2 * self.error >= bound
    # The published table's own gap is at the bound, but for the digits of a float.
    return True if self.value >= bound - 1e-9 and is_certain else None

  def is_positive(self) -> bool | None:
    """Returns whether a difference is above zero, by one of its deviations."""
    if self.error is None or abs(self.value) <= self.error:
      return None
    return self.value > 0


def accuracy_gap(search: SearchResult[Any], other: SearchResult[Any]) -> Points:
  """Returns how much more accurate one search is than another; both completed."""
  return Points.of(search) - Points.of(other)


def format_gaps(gaps: Mapping[str, Points]) -> str:
  """Returns differences, by what both sides have in common, as evidence."""
  return "; ".join(f"{name}: {gap}" for name, gap in gaps.items()) + " points."


def describe_accuracy(search: SearchResult[Any]) -> str:
  """Returns a search's accuracy in words."""
  if search.test_accuracy is None:
    return "diverges"
  return f"{format_accuracy(search.test_accuracy, search.test_accuracy_deviation)} %"


def all_hold(verdicts: Sequence[bool | None]) -> bool | None:
  """Returns whether all hold; None if none fails and some cannot tell."""
  return False if False in verdicts else None if None in verdicts else True


def trains_claim(
  claim: str,
  searches: Sequence[SearchResult[Any]],
  *,
  trains: bool = True,
  name: Callable[[SearchResult[Any]], str] = lambda search: search.row,
) -> Finding:
  """Returns a claim that networks train, or that they do not.

  Its evidence calls each network by its `name`.
  """
  evidence = "; ".join(
    f"{name(search)}: {describe_accuracy(search)}"
    + ("" if search.trains or search.test_accuracy is None else ", at chance")
    for search in searches
  )
  holds = all(search.trains == trains for search in searches)
  return Finding(claim, holds, f"{evidence}.")
