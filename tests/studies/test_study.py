"""A study as data: the runs it misses, what they come to, and `results.json`."""

import dataclasses
import math
import random

import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.studies import Run, Search, SearchConfig, Study
from skipinit_jax.studies.depth import DepthLabels
from skipinit_jax.studies.study import Key, check, missing_runs, summarize
from skipinit_jax.training import TrainConfig

THRESHOLD = 0.2
LABELS = DepthLabels("residual_mlp", 2, 8, "skipinit", 0.1)
PROTOCOL = SearchConfig(learning_rates=(0.25, 0.5), num_seeds=2, best_of=2)


def make_search(name, protocol=PROTOCOL, **fields):
  config = TrainConfig(model="residual_mlp", depth=2, width=8, **fields)
  return Search(name, f"row of {name}", "column", LABELS, config, protocol)


def make_study(*searches):
  return Study("depth_study", PROTOCOL, searches)


def make_run(key, accuracy, **changes):
  """A run that completed, or diverged if it has no accuracy."""
  diverged = accuracy is None
  curve = {"epoch": [1.0], "loss": [0.5], "accuracy": [0.5]}
  run = Run(
    **key._asdict(),
    status="diverged" if diverged else "completed",
    step=5 if diverged else 10,
    train_loss=math.nan if diverged else 1 - accuracy,
    train_accuracy=math.nan if diverged else 0.5,
    test_loss=None if diverged else math.inf,
    test_accuracy=accuracy,
    history={"train": curve, "test": {} if diverged else curve},
    seconds=1.5,
    device="1 x cpu",
    versions={"jax": "0.10"},
  )
  return dataclasses.replace(run, **changes)


def play(study, accuracy, order=None):
  """Runs a study to its end; returns its runs."""
  runs = {}
  while missing := missing_runs(study, runs, THRESHOLD):
    for _, key in order(missing) if order else missing:
      runs[key] = make_run(key, accuracy(key))
  return runs


def test_missing_runs_go_rate_by_rate_through_all_searches():
  study = make_study(make_search("a"), make_search("b"))
  keys = [key for _, key in missing_runs(study, {}, THRESHOLD)]
  # Two seeds of the first rate of each search, then the second rates.
  assert keys == [
    (search, rate, seed)
    for rate in (0.25, 0.5)
    for search in ("a", "b")
    for seed in (0, 1)
  ]
  assert [search.name for search, _ in missing_runs(study, {}, THRESHOLD)] == [
    key.search for key in keys
  ]


def test_finished_runs_are_not_missing_and_the_order_stays():
  study = make_study(make_search("a"), make_search("b"))
  keys = [key for _, key in missing_runs(study, {}, THRESHOLD)]
  done = keys[0], keys[3]
  runs = {key: make_run(key, 0.9) for key in done}
  left = [key for _, key in missing_runs(study, runs, THRESHOLD)]
  assert left == [key for key in keys if key not in done]


def test_a_search_extends_while_another_is_not_finished():
  study = make_study(make_search("a"), make_search("b"))
  accuracy = {0.25: 0.8, 0.5: 0.9}
  runs = {
    key: make_run(key, accuracy[key.learning_rate])
    for _, key in missing_runs(study, {}, THRESHOLD)
    if key.search == "a" or key.seed == 0
  }
  left = [key for _, key in missing_runs(study, runs, THRESHOLD)]
  assert left == [("a", 1.0, 0), ("a", 1.0, 1), ("b", 0.25, 1), ("b", 0.5, 1)]


def test_seeds_count_up_from_the_configuration_s():
  search = make_search("a", seed=7, l2=0.25)
  config = search.run_config(0.125, 2)
  assert (config.learning_rate, config.seed) == (0.125, 9)
  same = dataclasses.replace(config, learning_rate=search.config.learning_rate, seed=7)
  assert same == search.config


def test_summary_of_a_study():
  study = make_study(make_search("a"), make_search("b"))

  def accuracy(key):
    if key.search == "b":
      return None
    return {0.25: 0.8, 0.5: 0.9, 1.0: 0.7}[key.learning_rate] + 0.02 * key.seed

  results = summarize(study, play(study, accuracy), THRESHOLD, "python -m program")
  assert results.name == "depth_study"
  assert results.config["learning_rates"] == [0.25, 0.5]
  assert (results.command, results.threshold) == ("python -m program", THRESHOLD)
  assert (results.versions, results.devices) == ({"jax": "0.10"}, ["1 x cpu"])
  a, b = results.searches
  assert (a.name, a.row, a.column, a.labels) == (
    "a",
    "row of a",
    "column",
    LABELS,
  )
  assert [rate.learning_rate for rate in a.rates] == [0.25, 0.5, 1.0]
  assert a.optimum.learning_rate == 0.5 and a.optimum.is_inside
  assert a.test_accuracy == pytest.approx(0.91)
  assert a.test_accuracy_deviation == pytest.approx(0.02 / math.sqrt(2))
  assert a.train_loss == pytest.approx(0.09)
  assert (a.best_of, a.extends, a.trains, a.largest_stable_rate) == (2, True, True, 1.0)
  assert (a.num_runs, a.num_diverged) == (6, 0)
  # Its every run diverged: down to the lowest rate allowed, 2^-12.
  assert [math.log2(rate.learning_rate) for rate in b.rates] == list(range(-12, 0))
  assert (b.optimum, b.largest_stable_rate, b.test_accuracy) == (None, None, None)
  assert (b.train_loss, b.trains) == (None, False)
  assert (b.num_runs, b.num_diverged) == (24, 24)
  assert len(results.runs) == 6 + 24


def test_at_chance_is_not_trained():
  study = make_study(
    make_search("a", SearchConfig((0.5,), extend=False, num_seeds=1, best_of=1))
  )
  results = summarize(study, play(study, lambda key: THRESHOLD), THRESHOLD, "")
  (search,) = results.searches
  assert (search.test_accuracy, search.trains) == (THRESHOLD, False)
  assert search.largest_stable_rate is None


@pytest.mark.parametrize("seed", range(5))
def test_results_do_not_depend_on_the_order_of_the_runs(seed):
  rng = random.Random(seed)
  study = make_study(make_search("a"), make_search("b"))
  table = {}

  def accuracy(key):
    return table.setdefault(key, rng.choice([None, 0.1, 0.5, rng.random()]))

  expected = summarize(study, play(study, accuracy), THRESHOLD, "")

  def some(missing):
    return rng.sample(missing, rng.randint(1, len(missing)))

  runs = play(study, accuracy, some)
  shuffled = dict(rng.sample(list(runs.items()), len(runs)))
  # NaN is not equal to itself; the text of both is.
  assert repr(summarize(study, shuffled, THRESHOLD, "")) == repr(expected)


def test_runs_of_another_protocol_are_left_out():
  study = make_study(make_search("a"))
  runs = play(study, lambda key: 0.9 - abs(key.learning_rate - 0.5))
  others = [Key("a", 0.5, 2), Key("a", 8.0, 0), Key("z", 0.5, 0)]
  more = runs | {key: make_run(key, 0.99) for key in others}
  assert missing_runs(study, more, THRESHOLD) == []
  assert summarize(study, more, THRESHOLD, "") == summarize(study, runs, THRESHOLD, "")


def test_versions_of_a_study_that_went_on_with_newer_packages():
  study = make_study(make_search("a"))
  runs = play(study, lambda key: 0.9 - abs(key.learning_rate - 0.5))
  first, second, *_ = runs
  runs[first] = dataclasses.replace(
    runs[first], versions={"jax": "0.11"}, device="1 x gpu"
  )
  runs[second] = dataclasses.replace(runs[second], versions={"jax": "0.9", "new": "1"})
  results = summarize(study, runs, THRESHOLD, "")
  assert results.versions == {"jax": "0.10, 0.11, 0.9", "new": "1"}
  assert results.devices == ["1 x cpu", "1 x gpu"]


def test_signals_are_kept_only_of_the_runs_that_are_drawn():
  protocol = SearchConfig((0.25, 0.5), extend=False, num_seeds=3, best_of=2)
  study = make_study(*(make_search(name, protocol) for name in "abc"))

  def accuracy(key):
    # At its best rate, the first seed of "b" diverges, and so does all of "c".
    diverges = key == ("b", 0.5, 0) or key.search == "c"
    return None if diverges else key.learning_rate

  runs = play(study, accuracy)
  for key, run in runs.items():
    history = run.history | {"signal": {"step": [0], "block": [1]}}
    runs[key] = dataclasses.replace(run, history=history)
  results = summarize(study, runs, THRESHOLD, "")
  assert [
    (run.search, run.learning_rate, run.seed)
    for run in results.runs
    if "signal" in run.history
  ] == [("a", 0.5, 0), ("b", 0.5, 1)]
  assert all({*run.history} >= {"train", "test"} for run in results.runs)
  # The runs that were given are as they were.
  assert all("signal" in run.history for run in runs.values())


@pytest.mark.parametrize(
  ("searches", "message"),
  [
    ([], "The depth_study has no runs: name at least one of each list."),
    (
      [make_search("a"), make_search("b"), make_search("a")],
      "The depth_study would run a twice: name it once.",
    ),
    (
      [make_search("a", l2=-1.0)],
      "l2 is -1.0: it must be finite and not negative.",
    ),
    (
      [make_search("a", dataclasses.replace(PROTOCOL, best_of=9))],
      "a.best_of is 9: it must be from 1 to num_seeds, which is 2.",
    ),
    # The first seed is allowed, the second one is not.
    ([make_search("a", seed=2**32 - 1)], "seed is 4294967296: it must be below 2^32."),
  ],
)
def test_what_can_be_known_before_the_first_run(searches, message):
  with pytest.raises(UsageError) as error:
    check(make_study(*searches))
  assert str(error.value) == message


def test_impossible_network_is_known_before_the_first_run():
  search = make_search("a")
  impossible = dataclasses.replace(search, config=TrainConfig(depth=17))
  with pytest.raises(UsageError, match="depth is 17"):
    check(make_study(impossible))
  check(make_study(search))
