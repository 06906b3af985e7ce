"""The learning-rate search, played against networks whose outcomes are known."""

import dataclasses
import math
import random
import re

import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.studies import Outcome, SearchConfig, wanted_runs

THRESHOLD = 0.2
DIVERGED = Outcome(None, None)
CONFIG = SearchConfig(
  learning_rates=(2**-4, 2**-3),
  min_learning_rate=2**-8,
  max_learning_rate=2**2,
  num_seeds=1,
  best_of=1,
)


def exponents(runs):
  """The rates of runs as exponents of two, each once, in the order of the runs."""
  return list(dict.fromkeys(math.log2(rate) for rate, _ in runs))


def play(config, outcome):
  """Runs a search to its end; returns its rounds: the exponents each one added."""
  outcomes, rounds = {}, []
  while True:
    wanted = wanted_runs(config, outcomes, THRESHOLD)
    missing = [run for run in wanted if run not in outcomes]
    if not missing:
      return rounds
    rounds.append(exponents(missing))
    outcomes |= {run: outcome(*run) for run in missing}


def peak(best, *, diverges=math.inf, chance=math.inf):
  """A network with its best accuracy at 2^best, that fails from some exponent on."""

  def outcome(rate, seed):
    exponent = math.log2(rate)
    if exponent >= diverges:
      return DIVERGED
    if exponent >= chance:
      return Outcome(0.1, 2.3)
    return Outcome(0.9 - 0.05 * abs(exponent - best), 0.1 + abs(exponent - best))

  return outcome


UNSTABLE = {"until_unstable": True}
GRID = {"learning_rates": (0.5, 2**-9), "extend": False}


def loss_falls(rate, seed):
  """The training loss goes on falling where the accuracy has its peak, at 2^-3."""
  return Outcome(0.9 - 0.05 * abs(math.log2(rate) + 3), -math.log2(rate))


def one_seed_completes(rate, seed):
  """From 2^-3 on only one seed completes, with the highest accuracy of all."""
  return DIVERGED if rate >= 2**-3 and seed != 1 else Outcome(0.5 + rate, 0.1)


@pytest.mark.parametrize(
  ("changes", "outcome", "rounds"),
  [
    # The best rate is the higher, or the lower one: on until it is inside.
    ({}, peak(-3), [[-4, -3], [-2]]),
    ({}, peak(-4), [[-4, -3], [-5]]),
    ({}, peak(0), [[-4, -3], [-2], [-1], [0], [1]]),
    ({}, peak(-6), [[-4, -3], [-5], [-6], [-7]]),
    # Bounds are tried themselves, and not passed.
    ({}, peak(4), [[-4, -3], [-2], [-1], [0], [1], [2]]),
    ({}, peak(-10), [[-4, -3], [-5], [-6], [-7], [-8]]),
    # A rate that fails is beyond the best one too.
    ({}, peak(-3, diverges=-2), [[-4, -3], [-2]]),
    ({}, peak(0, diverges=-3), [[-4, -3], [-5]]),
    # Nothing trains: both sides, but not beyond a rate that diverges.
    ({}, peak(0, chance=-99), [[-4, -3], [-5, -2], [-6, -1], [-7, 0], [-8, 1], [2]]),
    ({}, peak(0, diverges=-99), [[-4, -3], [-5], [-6], [-7], [-8]]),
    (
      {},
      peak(0, chance=-99, diverges=-1),
      [[-4, -3], [-5, -2], [-6, -1], [-7], [-8]],
    ),
    # What is found on the way ends the search of both sides.
    ({}, peak(-6, chance=-5), [[-4, -3], [-5, -2], [-6, -1], [-7]]),
    # Up to the first rate at chance or that diverges, then no further.
    (UNSTABLE, peak(-4, chance=0), [[-4, -3], [-5, -2], [-1], [0]]),
    (UNSTABLE, peak(-4, diverges=0), [[-4, -3], [-5, -2], [-1], [0]]),
    # Down as well where the best rate is the lowest.
    (UNSTABLE, peak(-5, diverges=-2), [[-4, -3], [-5, -2], [-6]]),
    (UNSTABLE, peak(-3), [[-4, -3], [-2], [-1], [0], [1], [2]]),
    ({"learning_rates": (2**-3,)}, peak(-3), [[-3], [-4, -2]]),
    (GRID, peak(3), [[-1, -9]]),
    (GRID, peak(0, diverges=-99), [[-1, -9]]),
    ({}, loss_falls, [[-4, -3], [-2]]),
    (
      {"objective": "train_loss"},
      loss_falls,
      [[-4, -3], [-2], [-1], [0], [1], [2]],
    ),
    ({"num_seeds": 3, "best_of": 2}, one_seed_completes, [[-4, -3], [-5]]),
  ],
)
def test_extends_until_the_best_rate_is_inside(changes, outcome, rounds):
  assert play(dataclasses.replace(CONFIG, **changes), outcome) == rounds


def random_outcomes(rng):
  """A network without any regularity, with a fixed outcome for each rate and seed."""
  kinds = [DIVERGED, Outcome(0.1, 2.3)]
  kinds += [Outcome(rng.choice((0.3, 0.6, 0.61, 0.9)), rng.random()) for _ in range(4)]
  table = {}
  return lambda *run: table.setdefault(run, rng.choice(kinds))


def random_config(rng):
  lowest = rng.randint(-6, 0)
  seeds = rng.randint(1, 3)
  return SearchConfig(
    learning_rates=tuple(
      0.3 * 2.0 ** (lowest + index) for index in range(rng.randint(1, 3))
    ),
    extend=rng.random() < 0.9,
    min_learning_rate=0.3 * 2.0 ** (lowest - rng.randint(0, 5)),
    max_learning_rate=0.3 * 2.0 ** (lowest + rng.randint(3, 8)),
    num_seeds=seeds,
    best_of=rng.randint(1, seeds),
    objective=rng.choice(("test_accuracy", "train_loss")),
  )


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_any_number_of_workers_comes_to_the_same_runs(seed):
  rng = random.Random(seed)
  config = random_config(rng)
  if config.extend:
    config.until_unstable = rng.random() < 0.5
  config.validate("search")
  outcome = random_outcomes(rng)
  # Outcomes are fixed before the orders differ.
  for exponent in range(-20, 20):
    for each in range(config.num_seeds):
      outcome(0.3 * 2.0**exponent, each)

  finals = set()
  for _ in range(6):
    outcomes = {}
    # Interrupted again and again: runs end one by one, in any order.
    for _ in range(1000):
      wanted = wanted_runs(config, outcomes, THRESHOLD)
      assert len(set(wanted)) == len(wanted)
      assert set(outcomes) <= set(wanted), "a run was asked for, then not any more"
      missing = [run for run in wanted if run not in outcomes]
      if not missing:
        break
      for run in rng.sample(missing, rng.randint(1, len(missing))):
        outcomes[run] = outcome(*run)
    else:
      pytest.fail("the search does not end")
    finals.add(tuple(wanted))
    # Storages return the runs in another order than they ended in.
    shuffled = dict(rng.sample(list(outcomes.items()), len(outcomes)))
    assert wanted_runs(config, shuffled, THRESHOLD) == wanted
  (final,) = finals
  rates = list(dict.fromkeys(rate for rate, _ in final))
  seeds = range(config.num_seeds)
  assert [*final] == [(rate, each) for rate in rates for each in seeds]
  assert set(rates) >= set(config.learning_rates)
  for rate in rates:
    assert math.log2(rate / config.learning_rates[0]).is_integer()
    assert config.extend or rate in config.learning_rates
    assert rate in config.learning_rates or (
      config.min_learning_rate <= rate <= config.max_learning_rate
    )
  if config.extend:
    # No rate is left out between the lowest and the highest.
    assert max(rates) / min(rates) == pytest.approx(2 ** (len(rates) - 1))


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"learning_rates": ()}, "learning_rates is empty"),
    ({"learning_rates": (0.5, 0.5)}, "names a value twice"),
    ({"learning_rates": (0.5, 0.0)}, "each must be from 2^-100 to 2^100"),
    ({"learning_rates": (math.nan,)}, "each must be from 2^-100 to 2^100"),
    ({"learning_rates": (1e31,), "extend": False}, "each must be from 2^-100"),
    ({"learning_rates": ("0.5",)}, "a tuple, each a number"),
    ({"learning_rates": (0.125, 0.5)}, "between 0.125 and 0.5 the best rate could be"),
    ({"objective": "training_loss"}, "(did you mean 'train_loss'?)"),
    ({"num_seeds": 0, "best_of": 0}, "num_seeds is 0: it must be at least 1"),
    ({"num_seeds": 2, "best_of": 3}, "it must be from 1 to num_seeds, which is 2"),
    ({"num_seeds": 2, "best_of": 0}, "it must be from 1 to num_seeds, which is 2"),
    ({"extend": False, "until_unstable": True}, "until_unstable needs s.extend"),
    # A search down to 0 would never end.
    ({"min_learning_rate": 0.0}, "to the lowest of learning_rates, 0.0625"),
    ({"min_learning_rate": 0.125}, "to the lowest of learning_rates, 0.0625"),
    ({"max_learning_rate": 0.0625}, "from the highest of learning_rates, 0.125"),
    ({"max_learning_rate": math.inf}, "from the highest of learning_rates, 0.125"),
  ],
)
def test_bad_protocol_is_one_sentence(changes, words):
  with pytest.raises(UsageError, match=re.escape(words)):
    dataclasses.replace(CONFIG, **changes).validate("s")


def test_rates_in_any_order_and_whole_numbers_are_allowed():
  dataclasses.replace(CONFIG, learning_rates=(1, 0.25, 0.5)).validate("s")
  # Bounds and gaps mean nothing to a fixed grid.
  dataclasses.replace(CONFIG, learning_rates=(8.0, 0.1), extend=False).validate("s")
