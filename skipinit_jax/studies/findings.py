"""What a study says about the paper's claims, as pure functions of its results."""

import math
from collections.abc import Callable, Sequence

from skipinit_jax import methods
from skipinit_jax.document import Finding
from skipinit_jax.studies.names import format_accuracy, format_rate
from skipinit_jax.studies.statistics import Optimum, difference
from skipinit_jax.studies.study import SearchResult, StudyResults, unique

# The published table's largest distance between batch norm and SkipInit, alpha = 0,
# in percentage points: it is at a depth of 100.
_PUBLISHED_GAP = 0.5


def depth_findings(results: StudyResults) -> list[Finding]:
  """Checks the claims on depth (De & Smith, 2020, tables 1 and 2).

  Args:
    results: of a depth study.
  """
  findings = []
  # The last one is a reviewer's question.
  for name in (
    "batch_norm",
    "skipinit",
    "skipinit_inverse_sqrt_depth",
    "output_batch_norm",
  ):
    mine = _of_method(results.searches, name)
    if mine:
      claim = f"{methods.get(name).title} trains at every depth."
      findings.append(_trains(claim, mine, expected=True))
  for name, least in (("skipinit_one", 100), ("divide_by_sqrt2", 1000)):
    mine = _of_method(results.searches, name)
    deep = [search for search in mine if search.labels["depth"] >= least]
    if mine:
      claim = f"{methods.get(name).title} does not train at a depth of {least} or more."
      findings.append(_trains(claim, deep, expected=False))
  findings += _accuracy_gap(results)
  return findings


def _of_method(searches: Sequence[SearchResult], name: str) -> list[SearchResult]:
  """Returns the searches of a method that were trained with L2."""
  return [
    search
    for search in searches
    if search.labels["method"] == name and search.labels.get("l2", 1.0) > 0
  ]


def _trains(
  claim: str,
  searches: Sequence[SearchResult],
  expected: bool,
  name: Callable[[SearchResult], str] = lambda search: search.row,
) -> Finding:
  if not searches:
    return Finding(claim, None, "No network is so deep.")
  evidence = "; ".join(
    f"{name(search)}: {_accuracy(search)}"
    + ("" if search.trains or search.test_accuracy is None else ", at chance")
    for search in searches
  )
  holds = all(search.trains == expected for search in searches)
  return Finding(claim, holds, evidence + ".")


def _accuracy_gap(results: StudyResults) -> list[Finding]:
  gaps = []
  for row in unique([search.row for search in results.searches]):
    in_row = [search for search in results.searches if search.row == row]
    pair = _of_method(in_row, "skipinit") + _of_method(in_row, "batch_norm")
    if len(pair) == 2 and all(search.trains for search in pair):
      gaps.append((row, *accuracy_difference(*pair)))
  if not gaps:
    return []
  claim = (
    f"SkipInit, α = 0, is at most {_PUBLISHED_GAP} percentage points less accurate "
    "than batch norm."
  )
  return [Finding(claim, _at_least(gaps, -_PUBLISHED_GAP), _gap_evidence(gaps))]


def accuracy_difference(
  search: SearchResult, other: SearchResult
) -> tuple[float, float | None]:
  """Returns how much more accurate one search is, and its uncertainty, in points.

  Args:
    search: a search with a test accuracy.
    other: likewise.
  """
  assert search.test_accuracy is not None and other.test_accuracy is not None
  gap, error = difference(
    search.test_accuracy,
    search.test_accuracy_deviation,
    other.test_accuracy,
    other.test_accuracy_deviation,
  )
  return 100 * gap, None if error is None else 100 * error


def format_gap(gap: float, error: float | None) -> str:
  """Returns a difference in points, with its uncertainty where that is known."""
  return f"{gap:+.1f}" if error is None else f"{gap:+.1f}±{error:.1f}"


def _at_least(
  gaps: Sequence[tuple[str, float, float | None]], bound: float
) -> bool | None:
  """Returns whether all are above a bound; None if some are too uncertain to say."""
  return _all([_is_at_least(gap, error, bound) for _, gap, error in gaps])


def _all(verdicts: Sequence[bool | None]) -> bool | None:
  """Returns whether all hold; None if none fails and some cannot tell."""
  return False if False in verdicts else None if None in verdicts else True


def _is_at_least(gap: float, error: float | None, bound: float) -> bool | None:
  if error is None:
    return None
  if gap + 2 * error < bound:
    return False
  # A difference less certain than the bound itself shows nothing, unless far above.
  is_certain = error <= abs(bound) or gap - 2 * error >= bound
  # The published table's own gap is at the bound, but for the digits of a float.
  return True if gap >= bound - 1e-9 and is_certain else None


def batch_size_findings(results: StudyResults) -> list[Finding]:
  """Checks the claims on batch size and learning rate (De & Smith, 2020).

  Args:
    results: of a batch-size study.
  """
  budgets = unique([search.labels["budget"] for search in results.searches])
  # Rates are compared at the same epochs, where the study has them.
  budget = "epochs" if "epochs" in budgets else budgets[0]
  searches = [each for each in results.searches if each.labels["budget"] == budget]
  findings = []
  for column in unique([search.column for search in searches]):
    mine = [search for search in searches if search.column == column]
    findings.append(_is_linear(column, mine))
  findings += _stable_rates(searches)
  findings += _same_regime(searches)
  findings += _pays_at_large_batches(searches)
  return findings


def _is_linear(column: str, searches: Sequence[SearchResult]) -> Finding:
  claim = (
    f"{column}: below a threshold, the optimal learning rate is proportional to the "
    "batch size."
  )
  # A best rate at the edge of what was tried is only a bound of the optimal one.
  points = sorted(
    (math.log2(each.labels["batch_size"]), *map(math.log2, _rates(each.optimum)))
    for each in searches
    if each.optimum is not None and each.optimum.is_inside and each.trains
  )
  # The threshold is not known beforehand: the smaller half of the batch sizes, but
  # three at least, because rates are only known to a factor of two.
  points = points[: max(3, -(-len(points) // 2))]
  if len(points) < 3:
    return Finding(
      claim,
      None,
      "Fewer than three batch sizes train with a best rate inside those tried.",
    )
  (first, rate, lowest, highest), (last, last_rate, last_lowest, last_highest) = (
    points[0],
    points[-1],
  )
  slope, least, most = (
    growth / (last - first)
    for growth in (last_rate - rate, last_lowest - highest, last_highest - lowest)
  )
  evidence = (
    f"From batch size {2**first:.0f} to {2**last:.0f} the optimal rate goes from "
    f"{format_rate(2**rate)} to {format_rate(2**last_rate)}: it grows as the batch "
    f"size to the power {slope:.2f}"
    + (f" ({least:.2f} to {most:.2f} within its ranges)." if least < most else ".")
  )
  if 0.5 < slope < 1.5:
    return Finding(claim, True, evidence)
  return Finding(claim, None if least < 1.5 and most > 0.5 else False, evidence)


def _rates(optimum: Optimum) -> tuple[float, float, float]:
  return optimum.learning_rate, optimum.lowest_rate, optimum.highest_rate


def _pairs(
  searches: Sequence[SearchResult],
) -> list[tuple[int, SearchResult, SearchResult]]:
  """Returns batch norm and SkipInit by batch size, ascending."""
  pairs = []
  for size in sorted({search.labels["batch_size"] for search in searches}):
    same = [each for each in searches if each.labels["batch_size"] == size]
    pair = _of_method(same, "batch_norm") + _of_method(same, "skipinit")
    if len(pair) == 2 and all(search.trains for search in pair):
      pairs.append((size, pair[0], pair[1]))
  return pairs


def _stable_rates(searches: Sequence[SearchResult]) -> list[Finding]:
  pairs = _pairs(searches)
  if not pairs:
    return []
  evidence = "; ".join(
    f"batch {size}: {format_stable_rate(norm)} and {format_stable_rate(skip)}"
    for size, norm, skip in pairs
  )
  return [
    Finding(
      "Batch norm is stable at larger learning rates than SkipInit.",
      _all([_is_stabler(norm, skip) for _, norm, skip in pairs]),
      evidence + ".",
    )
  ]


def _is_stabler(search: SearchResult, other: SearchResult) -> bool | None:
  """Returns whether a search's largest stable rate is larger than another's."""
  rate, other_rate = search.largest_stable_rate, other.largest_stable_rate
  assert rate is not None and other_rate is not None
  if rate > other_rate:
    return None if is_stable_throughout(other) else True
  return None if is_stable_throughout(search) else False


def is_stable_throughout(search: SearchResult) -> bool:
  """Returns whether the highest rate that was tried still trains.

  Args:
    search: any search.
  """
  return search.largest_stable_rate == search.rates[-1].learning_rate


def format_stable_rate(search: SearchResult) -> str:
  """Returns the largest stable rate, as a bound where larger ones were not tried.

  Args:
    search: any search.
  """
  if search.largest_stable_rate is None:
    return "none"
  bound = "≥ " if is_stable_throughout(search) else ""
  return bound + format_rate(search.largest_stable_rate)


def _same_regime(searches: Sequence[SearchResult]) -> list[Finding]:
  pairs = _pairs(searches)
  if not pairs:
    return []
  size, norm, skip = pairs[0]
  assert norm.optimum is not None and skip.optimum is not None
  rate, lowest, highest = _rates(norm.optimum)
  other_rate, other_lowest, other_highest = _rates(skip.optimum)
  # A best rate at the edge of what was tried is only a bound of the optimal one.
  is_known = norm.optimum.is_inside and skip.optimum.is_inside
  if is_known and 0.5 <= rate / other_rate <= 2:
    holds = True
  elif is_known and not (lowest <= 2 * other_highest and other_lowest <= 2 * highest):
    holds = False
  else:
    holds = None
  return [
    Finding(
      "At the smallest batch size batch norm does not use its larger rates: its "
      "optimal rate is within a factor of two of SkipInit's.",
      holds,
      f"Batch {size}: {format_rate(norm.optimum.learning_rate)} and "
      f"{format_rate(skip.optimum.learning_rate)}.",
    )
  ]


def _pays_at_large_batches(searches: Sequence[SearchResult]) -> list[Finding]:
  pairs = _pairs(searches)
  if len(pairs) < 2:
    return []
  (small, *at_small), (large, *at_large) = pairs[0], pairs[-1]
  first, first_error = accuracy_difference(*at_small)
  last, last_error = accuracy_difference(*at_large)
  growth, error = difference(last, last_error, first, first_error)
  holds = None if error is None or abs(growth) <= error else growth > 0
  return [
    Finding(
      "Batch norm's larger rates pay at large batch sizes: its advantage over SkipInit "
      "is larger at the largest batch size than at the smallest.",
      holds,
      f"Batch {small}: {format_gap(first, first_error)} points, batch {large}: "
      f"{format_gap(last, last_error)} points.",
    )
  ]


def imagenet_findings(results: StudyResults) -> list[Finding]:
  """Checks what the ImageNet table of De & Smith (2020) shows.

  Args:
    results: of an ImageNet study.
  """
  found = []
  for title, name in (
    ("Regularized SkipInit", "regularized_skipinit"),
    ("Fixup with dropout", "fixup_dropout"),
  ):
    gaps = _gaps_to_batch_norm(results, name, range(1, 1025))
    if gaps:
      claim = (
        f"{title} is at least as accurate as batch norm at batch sizes up to 1024."
      )
      found.append(Finding(claim, _at_least(gaps, 0.0), _gap_evidence(gaps)))
  gaps = _gaps_to_batch_norm(results, "regularized_skipinit", range(4096, 2**31))
  if gaps:
    holds = _all([_is_at_least(-gap, error, 0.0) for _, gap, error in gaps])
    claim = (
      "At batch sizes of 4096 and more, batch norm is more accurate than Regularized "
      "SkipInit."
    )
    found.append(Finding(claim, holds, _gap_evidence(gaps)))
  return found


def _gaps_to_batch_norm(
  results: StudyResults, method: str, batch_sizes: range
) -> list[tuple[str, float, float | None]]:
  """Returns by batch size how much more accurate a method is than batch norm."""
  gaps = []
  for column in unique([each.column for each in results.searches]):
    mine = [
      each
      for each in results.searches
      if each.column == column and each.labels["batch_size"] in batch_sizes
    ]
    pair = _of_method(mine, method) + _of_method(mine, "batch_norm")
    if len(pair) == 2 and all(search.trains for search in pair):
      gaps.append((column, *accuracy_difference(*pair)))
  return gaps


def _gap_evidence(gaps: Sequence[tuple[str, float, float | None]]) -> str:
  evidence = "; ".join(f"{name}: {format_gap(gap, error)}" for name, gap, error in gaps)
  return f"{evidence} points."


def regularization_findings(results: StudyResults) -> list[Finding]:
  """Checks the claims on regularization (De & Smith, 2020), and its reviews' question.

  The paper adds biases and dropout together; a reviewer asks what each does alone.

  Args:
    results: of a regularization study.
  """
  plain = _regularized(results, use_bias=False, dropout=False, with_l2=True)
  biases = _regularized(results, use_bias=True, dropout=False, with_l2=True)
  dropout = _regularized(results, use_bias=False, dropout=True, with_l2=True)
  both = _regularized(results, use_bias=True, dropout=True, with_l2=True)
  without_l2 = _regularized(results, use_bias=False, dropout=False, with_l2=False)
  return [
    _is_better(claim, search, other)
    for claim, search, other in (
      ("Biases and dropout together make SkipInit more accurate.", both, plain),
      ("Biases alone make SkipInit more accurate.", biases, plain),
      ("Dropout alone makes SkipInit more accurate.", dropout, plain),
      ("L2 makes SkipInit more accurate.", plain, without_l2),
    )
    if search and other
  ]


def _regularized(
  results: StudyResults, *, use_bias: bool, dropout: bool, with_l2: bool
) -> SearchResult | None:
  """Returns SkipInit's most accurate search of this kind."""
  found = [
    search
    for search in results.searches
    if search.labels["method"] == "skipinit"
    and search.labels["use_bias"] == use_bias
    and (search.labels["dropout_rate"] > 0) == dropout
    and (search.labels["l2"] > 0) == with_l2
  ]
  return max(found, key=lambda search: search.test_accuracy or 0.0, default=None)


def _is_better(claim: str, search: SearchResult, other: SearchResult) -> Finding:
  evidence = (
    f"{search.row}, {search.column}: {_accuracy(search)}; {other.row}, "
    f"{other.column}: {_accuracy(other)}"
  )
  if search.test_accuracy is None or other.test_accuracy is None:
    both = search.test_accuracy is None and other.test_accuracy is None
    return Finding(
      claim, None if both else search.test_accuracy is not None, f"{evidence}."
    )
  gap, error = accuracy_difference(search, other)
  holds = None if error is None or abs(gap) <= error else gap > 0
  return Finding(
    claim, holds, f"{evidence}; difference {format_gap(gap, error)} points."
  )


def branch_scale_findings(results: StudyResults) -> list[Finding]:
  """Answers what the reviews of De & Smith (2020) ask about alpha.

  Args:
    results: of a branch-scale study.
  """
  rows = [
    [search for search in results.searches if search.row == row]
    for row in unique([search.row for search in results.searches])
  ]
  scaled = [row for row in rows if row[0].labels["alpha"] is not None]
  findings = [
    _trains(
      f"{search.row.split(', ')[0]}: {search.column} trains.", [search], expected=True
    )
    for row in rows
    if row not in scaled
    for search in row
  ]
  for row in scaled:
    findings += _any_alpha(row)
  for row in scaled:
    if row[0].labels["learnable"]:
      findings += _learnable_is_as_good(row, results.searches)
  return findings


def _any_alpha(searches: Sequence[SearchResult]) -> list[Finding]:
  """Checks that the accuracy of a row does not depend on alpha."""
  row = searches[0].row
  trained = [search for search in searches if search.trains]
  findings = [
    _trains(
      f"{row}: every α trains.", searches, True, name=lambda search: search.column
    )
  ]
  if len(trained) > 1:
    best = max(trained, key=lambda search: search.test_accuracy or 0.0)
    worst = min(trained, key=lambda search: search.test_accuracy or 0.0)
    gap, error = accuracy_difference(best, worst)
    findings.append(
      Finding(
        f"{row}: every α that trains is as accurate.",
        # Seven equal accuracies have a range of three such errors once in 20 times.
        None if error is None else gap <= 3 * error,
        f"{best.column} and {worst.column} differ by {format_gap(gap, error)} points.",
      )
    )
  return findings


def _learnable_is_as_good(
  searches: Sequence[SearchResult], others: Sequence[SearchResult]
) -> list[Finding]:
  """Compares a row of learnable alphas with that of the same constants."""
  verdicts: list[bool | None] = []
  evidence = []
  for search in searches:
    constant = next(
      (
        other
        for other in others
        if other.labels == search.labels | {"learnable": False}
      ),
      None,
    )
    if constant is None or not (search.trains or constant.trains):
      continue
    if search.trains != constant.trains:
      verdicts.append(search.trains)
      trained = "learnable" if search.trains else "constant"
      evidence.append(f"{search.column}: only the {trained} one trains")
    else:
      gap, error = accuracy_difference(search, constant)
      verdicts.append(None if error is None else gap >= -2 * error)
      evidence.append(f"{search.column}: {format_gap(gap, error)} points")
  if not verdicts:
    return []
  claim = f"{searches[0].row}: at least as accurate as the same constant."
  return [Finding(claim, _all(verdicts), "; ".join(evidence) + ".")]


def _accuracy(search: SearchResult) -> str:
  if search.test_accuracy is None:
    return "diverges"
  return f"{format_accuracy(search.test_accuracy, search.test_accuracy_deviation)} %"
