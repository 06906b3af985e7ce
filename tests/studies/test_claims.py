"""Verdicts on differences, and what the numbers in their evidence are."""

import pytest

from skipinit_jax.studies import claims
from skipinit_jax.studies.claims import Points
from tests.studies.results import make_result


@pytest.mark.parametrize(
  ("points", "error", "holds"),
  [
    # The bound is -0.5. At it, above it, and above zero by more than its uncertainty.
    (-0.1, 0.0, True),
    (-0.5, 0.1, True),
    (4.0, 1.0, True),
    # Below the bound by two points: by many deviations, by one, or who knows.
    (-2.5, 0.1, False),
    (-2.5, 2.0, None),
    (-2.5, None, None),
    # Within the bound, but less certain than the bound itself.
    (-0.1, 3.0, None),
    (0.0, None, None),
  ],
)
def test_at_least(points, error, holds):
  assert Points(points, error).is_at_least(-0.5) is holds


@pytest.mark.parametrize(
  ("points", "error", "holds"),
  [(1, 0.5, True), (-1, 0.5, False), (1, 1, None), (-1, 2, None), (1, None, None)],
)
def test_positive(points, error, holds):
  assert Points(points, error).is_positive() is holds


@pytest.mark.parametrize(
  ("verdicts", "holds"),
  [
    ([True, True], True),
    ([True, False], False),
    ([True, None], None),
    ([None, False], False),
  ],
)
def test_one_failure_is_enough_and_an_unclear_one_leaves_it_open(verdicts, holds):
  assert claims.all_hold(verdicts) is holds


def test_gap_and_its_uncertainty():
  search = make_result(accuracy=0.9, deviation=0.03)
  other = make_result(accuracy=0.92, deviation=0.04)
  gap = claims.accuracy_gap(search, other)
  # The root of 3 and 4 squared.
  assert gap == (pytest.approx(-2), pytest.approx(5))
  single = claims.accuracy_gap(search, make_result(accuracy=0.92, deviation=None))
  assert single == (pytest.approx(-2), None)
  assert claims.format_gaps({"both": gap, "one": single}) == (
    "both: -2.0±5.0; one: -2.0 points."
  )


def test_networks_train_or_not():
  networks = [
    make_result(row="good"),
    make_result(accuracy=0.1, row="chance"),
    make_result(accuracy=None, row="bad"),
    make_result(deviation=None, row="single"),
  ]
  finding = claims.trains_claim("All train.", networks)
  assert finding.holds is False
  assert finding.evidence == (
    "good: 90.0±0.1 %; chance: 10.0±0.1 %, at chance; bad: diverges; single: 90.0 %."
  )
  assert claims.trains_claim("", networks[:1]).holds is True
  assert claims.trains_claim("", networks[1:3], trains=False).holds is True
  assert claims.trains_claim("", networks[:2], trains=False).holds is False
