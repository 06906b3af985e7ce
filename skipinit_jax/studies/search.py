"""The learning-rate search: which runs the protocol asks for, given those so far."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.fields import call, check_types, taken
from skipinit_jax.studies.checks import check_lists
from skipinit_jax.studies.statistics import (
  OBJECTIVES,
  Optimum,
  Outcome,
  RateSummary,
  find_optimum,
  largest_stable_rate,
  summarize_rate,
)

# What a study's storage takes; beyond them a float soon has no digits left.
_LOWEST_RATE, _HIGHEST_RATE = 2.0**-100, 2.0**100


@dataclasses.dataclass
class SearchConfig:
  """The protocol of a learning-rate search.

  Attributes:
    learning_rates: rates to begin with; powers of two, without a gap if `extend`.
    extend: whether to go on by factors of two until the best rate is neither the lowest
      nor the highest tried; a network that no rate trains gets every rate in bounds.
    until_unstable: whether to also go up until a rate no longer trains, which finds
      the largest stable rate.
    min_learning_rate: the lowest rate that extending may reach.
    max_learning_rate: the highest.
    num_seeds: runs at each rate.
    best_of: how many of them, the best ones, the mean and deviation are over.
    objective: what makes a rate the best: test_accuracy or train_loss.
  """

  learning_rates: tuple[float, ...] = (2**-4, 2**-3, 2**-2, 2**-1)
  extend: bool = True
  until_unstable: bool = False
  min_learning_rate: float = 2**-12
  max_learning_rate: float = 2**4
  num_seeds: int = 7
  best_of: int = 5
  objective: str = "test_accuracy"

  def used(self) -> dict[str, Any]:
    """Returns the fields that have an effect, by name."""
    unused = frozenset() if self.extend else taken(_rates_beyond)
    fields = dataclasses.asdict(self)
    return {name: fields[name] for name in fields if name not in unused}

  def validate(self, name: str) -> None:
    """Raises a UsageError that calls the search `name` if a field is not allowed."""
    check_types(self, name)
    check_lists(self, name)
    rates = self.learning_rates
    if not all(_LOWEST_RATE <= rate <= _HIGHEST_RATE for rate in rates):
      raise UsageError(
        f"{name}.learning_rates is {rates}: each must be from 2^-100 to 2^100."
      )
    if self.objective not in OBJECTIVES:
      raise unknown_name(f"{name}.objective", self.objective, OBJECTIVES)
    if self.num_seeds < 1:
      raise UsageError(f"{name}.num_seeds is {self.num_seeds}: it must be at least 1.")
    if not 1 <= self.best_of <= self.num_seeds:
      raise UsageError(
        f"{name}.best_of is {self.best_of}: it must be from 1 to num_seeds, which is "
        f"{self.num_seeds}."
      )
    if not self.extend:
      if self.until_unstable:
        raise UsageError(f"{name}.until_unstable needs {name}.extend.")
      return
    ascending = sorted(rates)
    for low, high in itertools.pairwise(ascending):
      if high != 2 * low:
        raise UsageError(
          f"{name}.learning_rates is {rates}: between {low:g} and {high:g} the best "
          "rate could be missed. Name every factor of two, or turn extend off."
        )
    if not _LOWEST_RATE <= self.min_learning_rate <= ascending[0]:
      raise UsageError(
        f"{name}.min_learning_rate is {self.min_learning_rate:g}: it must be from "
        f"2^-100 to the lowest of learning_rates, {ascending[0]:g}."
      )
    if not ascending[-1] <= self.max_learning_rate <= _HIGHEST_RATE:
      raise UsageError(
        f"{name}.max_learning_rate is {self.max_learning_rate:g}: it must be from the "
        f"highest of learning_rates, {ascending[-1]:g}, to 2^100."
      )


def wanted_runs(
  config: SearchConfig,
  outcomes: Mapping[tuple[float, int], Outcome],
  threshold: float,
) -> list[tuple[float, int]]:
  """Returns all runs that a search asks for so far, finished ones included.

  The search is finished when each of them is. The answer depends on nothing but the
  outcomes of the runs it asked for, so that any number of workers in any order, with
  any interruption, come to the same runs.

  Args:
    outcomes: of the finished runs, by rate and seed; seeds count from 0.
    threshold: the accuracy above which a network trains.

  Returns:
    Rates and seeds, in the order in which to run them.
  """
  rates = list(config.learning_rates)
  while True:
    wanted = [(rate, seed) for rate in rates for seed in range(config.num_seeds)]
    if not all(run in outcomes for run in wanted):
      return wanted
    summaries = summarize_rates(config, {run: outcomes[run] for run in wanted})
    more = []
    if config.extend:
      best = find_optimum(summaries, config.objective)
      stable = largest_stable_rate(summaries, threshold)
      more = call(_rates_beyond, config, summaries, best, stable)
    if not more:
      return wanted
    rates += more


def summarize_rates(
  config: SearchConfig, outcomes: Mapping[tuple[float, int], Outcome]
) -> list[RateSummary]:
  """Returns the statistics of each rate, ascending."""
  by_rate: dict[float, list[Outcome]] = {}
  for (rate, _), outcome in sorted(outcomes.items(), key=lambda run: run[0]):
    by_rate.setdefault(rate, []).append(outcome)
  return [summarize_rate(rate, runs, config.best_of) for rate, runs in by_rate.items()]


def _rates_beyond(
  rates: Sequence[RateSummary],
  best: Optimum | None,
  largest_stable: float | None,
  until_unstable: bool,
  min_learning_rate: float,
  max_learning_rate: float,
) -> list[float]:
  """Returns the next rates on the sides where the search has to go on."""
  lowest, highest = rates[0], rates[-1]
  if best is None or largest_stable is None:
    # Nothing trains: a rate that does may lie on either side, but not beyond one at
    # which the runs already diverge.
    down, up = True, highest.test_accuracy is not None
  else:
    down = best.learning_rate == lowest.learning_rate
    up = best.learning_rate == highest.learning_rate or (
      until_unstable and largest_stable == highest.learning_rate
    )
  more = []
  if down and lowest.learning_rate / 2 >= min_learning_rate:
    more.append(lowest.learning_rate / 2)
  if up and highest.learning_rate * 2 <= max_learning_rate:
    more.append(highest.learning_rate * 2)
  return more
