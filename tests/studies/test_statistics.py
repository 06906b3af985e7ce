"""The protocol's statistics, on cases computed by hand."""

import math

import numpy as np
import pytest

from skipinit_jax import data
from skipinit_jax.studies import Outcome, find_optimum, largest_stable_rate
from skipinit_jax.studies.statistics import above_chance, summarize_rate


def summary(rate, accuracies, best_of=1, losses=None):
  """The statistics of a rate; None is a diverged run."""
  losses = losses or [None if each is None else 1 - each for each in accuracies]
  runs = [Outcome(*each) for each in zip(accuracies, losses, strict=True)]
  return summarize_rate(rate, runs, best_of)


def test_mean_and_deviation_over_the_best_two_of_four():
  rate = summarize_rate(
    0.5,
    [Outcome(0.7, 0.1), Outcome(0.9, 0.4), Outcome(0.1, 0.2), Outcome(0.8, 0.3)],
    best_of=2,
  )
  assert (rate.learning_rate, rate.num_runs, rate.num_diverged) == (0.5, 4, 0)
  assert rate.test_accuracy == pytest.approx(0.85)
  # Two values a distance x apart have the sample deviation x / sqrt(2).
  assert rate.test_accuracy_deviation == pytest.approx(0.1 / math.sqrt(2))
  # The lowest losses are those of other seeds.
  assert rate.train_loss == pytest.approx(0.15)
  assert rate.train_loss_deviation == pytest.approx(0.1 / math.sqrt(2))


@pytest.mark.parametrize(
  ("accuracies", "best_of", "num_diverged", "mean", "deviation"),
  [
    # Those that diverged are left out, or the worst.
    ([0.9, None, 0.91, 0.92, None, 0.93, 0.94], 5, 2, 0.92, math.sqrt(0.001 / 4)),
    ([0.1, 0.93, 0.91, 0.2, 0.94, 0.92, 0.9], 5, 0, 0.92, math.sqrt(0.001 / 4)),
    # Too few runs have no mean, and one has no deviation.
    ([0.9, 0.9, None], 3, 1, None, None),
    ([0.3, 0.6, None], 1, 1, 0.6, None),
  ],
)
def test_means_and_deviations(accuracies, best_of, num_diverged, mean, deviation):
  rate = summary(0.5, accuracies, best_of)
  assert (rate.num_runs, rate.num_diverged) == (len(accuracies), num_diverged)
  deviation = pytest.approx(deviation)
  assert rate.test_accuracy == pytest.approx(mean)
  assert rate.test_accuracy_deviation == deviation
  assert rate.train_loss == (None if mean is None else pytest.approx(1 - mean))
  assert rate.train_loss_deviation == deviation


@pytest.mark.parametrize(
  ("accuracies", "best", "within", "inside"),
  [
    # Means 0.89, 0.895, 0.9, 0.895, 0.89; the deviation at the best rate is 0.00707.
    (
      [[0.89] * 2, [0.895] * 2, [0.905, 0.895], [0.895] * 2, [0.89] * 2],
      2.0**2,
      (2.0, 2.0**3),
      True,
    ),
    # The rate between is worse, the one far below is within a deviation.
    ([[0.9, 0.88], [0.5, 0.5], [0.91, 0.89]], 4.0, (1.0, 4.0), False),
    # Exactly a deviation away: mean 0.75, deviation 0.25, numbers that floats hold.
    ([[0.5, 0.5, 0.5], [0.5, 0.75, 1.0]], 2.0, (1.0, 2.0), False),
    # Without a deviation only ties are in the range, of which the largest is the best.
    ([[0.5], [0.75]], 2.0, (2.0, 2.0), False),
    ([[0.9], [0.9], [0.9], [0.5]], 4.0, (1.0, 4.0), True),
    ([[0.9], [0.8], [0.7]], 1.0, (1.0, 1.0), False),
    # A rate at which everything diverged is a tried one.
    ([[0.7], [0.9], [None]], 2.0, (2.0, 2.0), True),
    ([[None], [0.9], [0.8]], 2.0, (2.0, 2.0), True),
    ([[0.9], [None], [None]], 1.0, (1.0, 1.0), False),
  ],
)
def test_optimum_and_its_range(accuracies, best, within, inside):
  rates = [
    summary(2.0**index, each, len(each)) for index, each in enumerate(accuracies)
  ]
  optimum = find_optimum(rates[::-1], "test_accuracy")
  assert optimum.objective == "test_accuracy"
  assert (optimum.learning_rate, optimum.is_inside) == (best, inside)
  assert (optimum.lowest_rate, optimum.highest_rate) == within
  (chosen,) = (each for each in rates if each.learning_rate == best)
  assert optimum.value == chosen.test_accuracy
  assert optimum.deviation == chosen.test_accuracy_deviation


def test_training_loss_decides_where_it_is_the_objective():
  # The lowest loss is at the lower rate, the highest accuracy at the higher one.
  rates = [
    summary(0.25, [0.8, 0.8], 2, losses=[0.1, 0.3]),
    summary(0.5, [0.9, 0.9], 2, losses=[0.3, 0.3]),
    summary(1.0, [0.7, 0.7], 2, losses=[0.5, 0.5]),
  ]
  by_loss = find_optimum(rates, "train_loss")
  assert (by_loss.learning_rate, by_loss.value) == (0.25, pytest.approx(0.2))
  # 0.3 is within the deviation 0.141 of 0.2, 0.5 is not.
  assert (by_loss.lowest_rate, by_loss.highest_rate) == (0.25, 0.5)
  assert find_optimum(rates, "test_accuracy").learning_rate == 0.5


def test_where_no_rate_completes_there_is_no_optimum():
  rates = [summary(0.25, [None]), summary(0.5, [None])]
  assert find_optimum(rates, "test_accuracy") is None
  assert find_optimum([], "test_accuracy") is None
  assert largest_stable_rate(rates, 0.1) is None


def test_largest_stable_rate_trains_and_completes():
  rates = [
    summary(0.25, [0.9, 0.9], 2),
    summary(0.5, [0.3, 0.3], 2),
    # At chance, exactly at the threshold, and with too few completed runs.
    summary(1.0, [0.1, 0.1], 2),
    summary(2.0, [0.2, 0.2], 2),
    summary(4.0, [0.9, None], 2),
  ]
  assert largest_stable_rate(rates, 0.2) == 0.5
  assert largest_stable_rate(rates, 0.1) == 2.0
  assert largest_stable_rate(rates, 0.95) is None


def test_threshold_is_three_standard_errors_above_chance():
  # Share 1/2 of 100 labels: a standard error of 0.05.
  assert above_chance(np.repeat([0, 1], 50)) == pytest.approx(0.65)
  # The most frequent label counts.
  assert above_chance(np.repeat([0, 1, 1, 1], 25)) == pytest.approx(
    0.75 + 3 * 0.0433, 1e-3
  )


def test_networks_that_always_guess_one_digit_do_not_train():
  labels = data.load("digits").test.labels
  guesses = [summary(0.5, [float(np.mean(labels == digit))]) for digit in range(10)]
  assert largest_stable_rate(guesses, above_chance(labels)) is None
  # Nor do networks that guess at random, but for three in a thousand of them.
  random = np.random.default_rng(0)
  accuracies = [
    float(np.mean(random.integers(10, size=len(labels)) == labels)) for _ in range(1000)
  ]
  assert np.mean(np.array(accuracies) > above_chance(labels)) <= 0.003
