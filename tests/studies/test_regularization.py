"""The regularization study: its combinations, claims and report."""

import dataclasses

import pytest

from skipinit_jax.studies import RegularizationStudyConfig, regularization_study
from skipinit_jax.studies.regularization import (
  RegularizationLabels,
  gains_table,
  regularization_claims,
)
from skipinit_jax.training import TrainConfig
from tests.studies.results import make_result, make_results, verdicts

# A whole number names the same runs as the float does.
CONFIG = RegularizationStudyConfig(
  dropout_rates=(0, 0.2, 0.6), train=TrainConfig(epochs=3, l2=0.25)
)


def test_every_combination_and_its_names():
  study = regularization_study(CONFIG)
  assert [search.name for search in study.searches] == [
    f"{method}/{biases}/dropout_{rate}"
    for method in ("batch_norm", "skipinit", "skipinit_without_l2")
    for biases in ("no_biases", "biases")
    for rate in (0.0, 0.2, 0.6)
  ]
  for search in study.searches:
    labels = dataclasses.asdict(search.labels)
    # A search changes only what it is named after.
    assert search.config == dataclasses.replace(CONFIG.train, **labels)
    assert labels["l2"] == (0.0 if "_without_l2" in search.name else 0.25)
    # What its name says is what the network has.
    method = search.config.make_method()
    assert method.use_bias == ("/biases/" in search.name)
    assert search.name.endswith(f"dropout_{method.dropout_rate}")


def regularized(
  accuracy, use_bias, dropout, l2=5e-4, method="skipinit", deviation=1e-3
):
  labels = RegularizationLabels(method, use_bias, dropout, l2)
  row = f"{method} {'biases' if use_bias else 'no biases'}"
  return make_result(labels, accuracy, deviation, row=row, column=f"dropout {dropout}")


def findings_on(*searches):
  return regularization_claims(make_results("regularization_study", searches))


PLAIN, BIASES, DROPOUT, BOTH = (False, 0.0), (True, 0.0), (False, 0.6), (True, 0.6)


@pytest.mark.parametrize(
  ("changed_as", "plain_as", "claim"),
  [
    (BOTH, PLAIN, "Biases and dropout together make SkipInit more accurate."),
    (BIASES, PLAIN, "Biases alone make SkipInit more accurate."),
    (DROPOUT, PLAIN, "Dropout alone makes SkipInit more accurate."),
    (PLAIN, (*PLAIN, 0.0), "L2 makes SkipInit more accurate."),
  ],
)
@pytest.mark.parametrize(
  ("plain", "changed", "deviation", "holds", "evidence"),
  [
    (0.9, 0.92, 0.001, True, "90.0±0.1 %; difference +2.0±0.1 points."),
    (0.92, 0.9, 0.001, False, "difference -2.0±0.1 points."),
    (0.9, 0.92, 0.02, None, "difference +2.0±2.8 points."),
    (0.9, 0.92, None, None, "difference +2.0 points."),
    (None, 0.9, 0.001, True, "no biases, dropout 0.0: diverges."),
    (0.9, None, 0.001, False, "no biases, dropout 0.0: 90.0±0.1 %."),
    (None, None, 0.001, None, "no biases, dropout 0.0: diverges."),
  ],
)
def test_what_makes_skipinit_more_accurate(
  changed_as, plain_as, claim, plain, changed, deviation, holds, evidence
):
  (finding,) = findings_on(
    regularized(plain, *plain_as, deviation=deviation),
    regularized(changed, *changed_as, deviation=deviation),
    # These are other networks.
    regularized(0.99, *BOTH, l2=0.0),
    regularized(0.99, *changed_as, method="batch_norm"),
  )
  assert (finding.claim, finding.holds) == (claim, holds)
  assert finding.evidence.endswith(evidence)


def test_the_better_of_two_dropout_rates_counts():
  searches = [regularized(0.9, *PLAIN), regularized(0.3, False, 0.2)]
  assert list(verdicts(findings_on(*searches)).values()) == [False]
  better = findings_on(*searches, regularized(0.95, *DROPOUT))
  assert list(verdicts(better).values()) == [True]


def test_what_each_adds_is_over_the_same_network_without_it():
  accuracies = {
    (use_bias, dropout, l2): 0.8
    + 0.01 * use_bias
    + 0.02 * (dropout > 0)
    + 0.04 * bool(l2)
    for use_bias in (False, True)
    for dropout in (0.0, 0.2)
    for l2 in (0.0, 5e-4)
  }
  searches = [regularized(value, *labels) for labels, value in accuracies.items()]
  table = gains_table(make_results("regularization_study", searches))
  rows = {tuple(row[2:]) for row in table.rows}
  assert len(table.rows) == 8 and len(rows) == 8
  assert ("+1.0±0.1", "+2.0±0.1", "+4.0±0.1", "+7.0±0.1") in rows
  assert ("", "", "", "") in rows
