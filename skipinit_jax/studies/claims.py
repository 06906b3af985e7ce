"""What the claims of several studies share: differences, verdicts and their words.

A verdict is True where the results agree with a claim, False where they do not, and
None where they cannot tell.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from skipinit_jax.document import Finding
from skipinit_jax.studies.formatting import format_accuracy
from skipinit_jax.studies.statistics import difference
from skipinit_jax.studies.study import SearchResult


class Gap(NamedTuple):
  """How much more accurate one search is than another.

  Attributes:
    name: what the two have in common.
    points: the difference in percentage points.
    error: its uncertainty; None: unknown.
  """

  name: str
  points: float
  error: float | None

  def __str__(self) -> str:
    return format_gap(self.points, self.error)


def accuracy_gap(
  search: SearchResult[Any], other: SearchResult[Any], name: str = ""
) -> Gap:
  """Returns how much more accurate one search is than another; both completed."""
  assert search.test_accuracy is not None and other.test_accuracy is not None
  points, error = difference(
    search.test_accuracy,
    search.test_accuracy_deviation,
    other.test_accuracy,
    other.test_accuracy_deviation,
  )
  return Gap(name, 100 * points, None if error is None else 100 * error)


def format_gap(points: float, error: float | None) -> str:
  """Returns a difference in points, with its uncertainty where that is known."""
  return f"{points:+.1f}" if error is None else f"{points:+.1f}±{error:.1f}"


def format_gaps(gaps: Sequence[Gap]) -> str:
  """Returns differences as the evidence of a claim."""
  return "; ".join(f"{gap.name}: {gap}" for gap in gaps) + " points."


def describe_accuracy(search: SearchResult[Any]) -> str:
  """Returns a search's accuracy in words."""
  if search.test_accuracy is None:
    return "diverges"
  return f"{format_accuracy(search.test_accuracy, search.test_accuracy_deviation)} %"


def all_hold(verdicts: Sequence[bool | None]) -> bool | None:
  """Returns whether all hold; None if none fails and some cannot tell."""
  return False if False in verdicts else None if None in verdicts else True


def is_at_least(points: float, error: float | None, bound: float) -> bool | None:
  """Returns whether a difference is at least a bound, by two of its uncertainties."""
  if error is None:
    return None
  if points + 2 * error < bound:
    return False
  # A difference less certain than the bound itself shows nothing, unless far above.
  is_certain = error <= abs(bound) or points - 2 * error >= bound
  # The published table's own gap is at the bound, but for the digits of a float.
  return True if points >= bound - 1e-9 and is_certain else None


def is_positive(points: float, error: float | None) -> bool | None:
  """Returns whether a difference is above zero, by one of its uncertainties."""
  return None if error is None or abs(points) <= error else points > 0


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
