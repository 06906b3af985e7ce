"""Statistics of runs: the protocol's means, optima and ranges, as pure functions."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import numpy as np

OBJECTIVES: tuple[str, ...] = ("test_accuracy", "train_loss")


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What one run came to.

  Attributes:
    test_accuracy: from 0 to 1; None if the run diverged.
    train_loss: mean over the last epoch; None if the run diverged.
  """

  test_accuracy: float | None
  train_loss: float | None


@dataclasses.dataclass(frozen=True)
class RateSummary:
  """The runs at one learning rate, which differ in their seed.

  The means and deviations are over the best k of the n runs, each quantity's own best
  ones, so that failed seeds do not skew them. They are None where fewer than k runs
  completed, and the deviations also for k = 1.

  Attributes:
    learning_rate: the rate.
    num_runs: n, diverged runs included.
    num_diverged: how many of them diverged.
    test_accuracy: mean of the k highest test accuracies, from 0 to 1.
    test_accuracy_deviation: their sample standard deviation.
    train_loss: mean of the k lowest training losses.
    train_loss_deviation: their sample standard deviation.
  """

  learning_rate: float
  num_runs: int
  num_diverged: int
  test_accuracy: float | None
  test_accuracy_deviation: float | None
  train_loss: float | None
  train_loss_deviation: float | None


@dataclasses.dataclass(frozen=True)
class Optimum:
  """The best rate of a search, by one objective.

  Attributes:
    objective: what decided: test_accuracy (the highest) or train_loss (the lowest).
    value: the objective's mean at the best rate.
    deviation: its deviation there; None for k = 1.
    learning_rate: the rate with the best mean; of several, the largest.
    lowest_rate: the lowest rate whose mean lies within one deviation of the best.
    highest_rate: the highest such rate.
    is_inside: whether a lower and a higher rate were tried, so that the best one does
      not lie at the edge of what was tried.
  """

  objective: str
  value: float
  deviation: float | None
  learning_rate: float
  lowest_rate: float
  highest_rate: float
  is_inside: bool


def summarize_rate(
  learning_rate: float, outcomes: Sequence[Outcome], best_of: int
) -> RateSummary:
  """Returns the statistics of the runs at one rate, with means over the best k."""
  accuracies = [run.test_accuracy for run in outcomes if run.test_accuracy is not None]
  losses = [run.train_loss for run in outcomes if run.train_loss is not None]
  accuracy, accuracy_deviation = _mean(sorted(accuracies, reverse=True), best_of)
  loss, loss_deviation = _mean(sorted(losses), best_of)
  return RateSummary(
    learning_rate=learning_rate,
    num_runs=len(outcomes),
    num_diverged=len(outcomes) - len(accuracies),
    test_accuracy=accuracy,
    test_accuracy_deviation=accuracy_deviation,
    train_loss=loss,
    train_loss_deviation=loss_deviation,
  )


def _mean(values: Sequence[float], count: int) -> tuple[float | None, float | None]:
  """Returns mean and deviation of the first values; None if there are too few."""
  best = values[:count]
  if len(best) < count:
    return None, None
  return statistics.fmean(best), statistics.stdev(best) if count > 1 else None


def find_optimum(rates: Sequence[RateSummary], objective: str) -> Optimum | None:
  """Returns the best rate and its range.

  The optimal learning rate is the one with the best mean; its range holds every rate
  whose mean lies within one deviation of it (our reading of De & Smith, 2020). A rate
  at which too few runs completed cannot be the best one, but shows that the search has
  gone far enough.

  Args:
    rates: of each rate that was tried, in any order.
    objective: what decides: one of `OBJECTIVES`.

  Returns:
    The optimum; None if too few runs completed at every rate.
  """
  means = {rate: getattr(rate, objective) for rate in rates}
  means = {rate: mean for rate, mean in means.items() if mean is not None}
  if not means:
    return None
  sign = 1 if objective == "test_accuracy" else -1
  best = max(means, key=lambda rate: (sign * means[rate], rate.learning_rate))
  value, deviation = means[best], getattr(best, f"{objective}_deviation")
  within = [
    rate.learning_rate
    for rate, mean in means.items()
    if sign * (value - mean) <= (deviation or 0.0)
  ]
  tried = [rate.learning_rate for rate in rates]
  return Optimum(
    objective=objective,
    value=value,
    deviation=deviation,
    learning_rate=best.learning_rate,
    lowest_rate=min(within),
    highest_rate=max(within),
    is_inside=min(tried) < best.learning_rate < max(tried),
  )


def largest_stable_rate(rates: Sequence[RateSummary], threshold: float) -> float | None:
  """Returns the largest rate that still trains; None if there is none.

  At a rate that trains enough runs completed, and their mean test accuracy is above
  the threshold, see `above_chance`.
  """
  stable = [
    rate.learning_rate
    for rate in rates
    if rate.test_accuracy is not None and rate.test_accuracy > threshold
  ]
  return max(stable, default=None)


def above_chance(labels: np.ndarray) -> float:
  """Returns the accuracy above which a network has learned something.

  Chance is the share of the most frequent of the test set's labels, [N] int.
  """
  return above_share(float(np.bincount(labels).max() / len(labels)), len(labels))


def above_share(share: float, num_examples: int) -> float:
  """Returns a share plus three standard errors of it over so many examples."""
  return share + 3 * math.sqrt(share * (1 - share) / num_examples)
