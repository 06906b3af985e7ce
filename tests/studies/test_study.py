"""A study as data: the runs it misses, what they come to, and `results.json`."""

import dataclasses
import math
import random

import pytest
from flax import linen as nn

from skipinit_jax.errors import UsageError
from skipinit_jax.models import registry
from skipinit_jax.studies import Search, SearchConfig, Study
from skipinit_jax.studies.depth import DepthLabels
from skipinit_jax.studies.study import Key, check, missing_runs, summarize
from skipinit_jax.training import TrainConfig
from tests.studies.results import make_run, play

THRESHOLD = 0.2
LABELS = DepthLabels("residual_mlp", 2, 8, "skipinit", 0.1)
PROTOCOL = SearchConfig(learning_rates=(0.25, 0.5), num_seeds=2, best_of=2)


def make_search(name, protocol=PROTOCOL, depth=2, **fields):
  config = TrainConfig(model="residual_mlp", depth=depth, width=8, **fields)
  return Search(name, f"row of {name}", "column", LABELS, config, protocol)


def make_study(*searches):
  return Study("depth_study", PROTOCOL, searches)


def play_accuracy(study, accuracy, order=list):
  """Runs a study to its end, with an accuracy by key; returns its runs."""
  return play(study, lambda search, key: make_run(key, accuracy(key)), order, THRESHOLD)


def test_missing_runs_go_rate_by_rate_through_all_searches():
  study = make_study(make_search("a"), make_search("b"))
  missing = missing_runs(study, {}, THRESHOLD)
  keys = [key for _, key in missing]
  # Two seeds of the first rate of each search, then the second rates.
  assert keys == [
    (search, rate, seed)
    for rate in (0.25, 0.5)
    for search in ("a", "b")
    for seed in (0, 1)
  ]
  assert [search.name for search, _ in missing] == [key.search for key in keys]
  # What is finished is not missing, and the order stays.
  runs = {key: make_run(key, 0.9) for key in (keys[0], keys[3])}
  left = [key for _, key in missing_runs(study, runs, THRESHOLD)]
  assert left == [key for key in keys if key not in runs]


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
  one_run = SearchConfig((0.5,), extend=False, num_seeds=1, best_of=1)
  study = make_study(make_search("a"), make_search("b"), make_search("c", one_run))

  def accuracy(key):
    if key.search != "a":
      return {"b": None, "c": THRESHOLD}[key.search]
    return {0.25: 0.8, 0.5: 0.9, 1.0: 0.7}[key.learning_rate] + 0.02 * key.seed

  results = summarize(study, play_accuracy(study, accuracy), THRESHOLD, "command")
  assert (results.name, results.command) == ("depth_study", "command")
  assert results.config["learning_rates"] == [0.25, 0.5]
  assert (results.versions, results.devices) == ({"jax": "0.10.2"}, ["1 x cpu"])
  a, b, c = results.searches
  assert (a.name, a.row, a.column, a.labels) == ("a", "row of a", "column", LABELS)
  assert [rate.learning_rate for rate in a.rates] == [0.25, 0.5, 1.0]
  assert a.optimum.learning_rate == 0.5 and a.optimum.is_inside
  assert a.test_accuracy == pytest.approx(0.91)
  assert a.test_accuracy_deviation == pytest.approx(0.02 / math.sqrt(2))
  assert a.train_loss == pytest.approx(0.59)
  assert (a.best_of, a.extends, a.trains, a.largest_stable_rate) == (2, True, True, 1.0)
  assert (a.num_runs, a.num_diverged) == (6, 0)
  # Its every run diverged: down to the lowest rate allowed, 2^-12.
  assert [math.log2(rate.learning_rate) for rate in b.rates] == list(range(-12, 0))
  assert (b.optimum, b.largest_stable_rate, b.test_accuracy) == (None, None, None)
  assert (b.trains, b.num_runs, b.num_diverged) == (False, 24, 24)
  # At chance is not trained.
  assert (c.test_accuracy, c.trains, c.largest_stable_rate) == (THRESHOLD, False, None)
  assert len(results.runs) == 6 + 24 + 1


@pytest.mark.parametrize("seed", range(5))
def test_results_do_not_depend_on_the_order_of_the_runs(seed):
  rng = random.Random(seed)
  study = make_study(make_search("a"), make_search("b"))
  table = {}

  def accuracy(key):
    return table.setdefault(key, rng.choice([None, 0.1, 0.5, rng.random()]))

  expected = summarize(study, play_accuracy(study, accuracy), THRESHOLD, "")

  def some(missing):
    return rng.sample(missing, rng.randint(1, len(missing)))

  runs = play_accuracy(study, accuracy, some)
  shuffled = dict(rng.sample(list(runs.items()), len(runs)))
  # NaN is not equal to itself; the text of both is.
  assert repr(summarize(study, shuffled, THRESHOLD, "")) == repr(expected)


def test_runs_of_another_protocol_are_left_out():
  study = make_study(make_search("a"))
  runs = play_accuracy(study, lambda key: 0.9 - abs(key.learning_rate - 0.5))
  others = [Key("a", 0.5, 2), Key("a", 8.0, 0), Key("z", 0.5, 0)]
  more = runs | {key: make_run(key, 0.99) for key in others}
  assert missing_runs(study, more, THRESHOLD) == []
  assert summarize(study, more, THRESHOLD, "") == summarize(study, runs, THRESHOLD, "")


def test_versions_of_a_study_that_went_on_with_newer_packages():
  study = make_study(make_search("a"))
  runs = play_accuracy(study, lambda key: 0.9 - abs(key.learning_rate - 0.5))
  first, second, *_ = runs
  runs[first] = make_run(first, versions={"jax": "0.11"}, device="1 x gpu")
  runs[second] = make_run(second, versions={"jax": "0.9", "new": "1"})
  results = summarize(study, runs, THRESHOLD, "")
  assert results.versions == {"jax": "0.10.2, 0.11, 0.9", "new": "1"}
  assert results.devices == ["1 x cpu", "1 x gpu"]


def test_signals_are_kept_only_of_the_runs_that_are_drawn():
  protocol = SearchConfig((0.25, 0.5), extend=False, num_seeds=3, best_of=2)
  study = make_study(*(make_search(name, protocol) for name in "abc"))

  def accuracy(key):
    # At its best rate, the first seed of "b" diverges, and so does all of "c".
    diverges = key == ("b", 0.5, 0) or key.search == "c"
    return None if diverges else key.learning_rate

  runs = play_accuracy(study, accuracy)
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
  ("searches", "words"),
  [
    ([], "depth_study has no runs"),
    ([make_search("a"), make_search("b"), make_search("a")], "would run a twice"),
    ([make_search("a", l2=-1.0)], "l2 is -1.0"),
    ([make_search("a", dataclasses.replace(PROTOCOL, best_of=9))], "a.best_of is 9"),
    # The first seed is allowed, the second one is not.
    ([make_search("a", seed=2**32 - 1)], "seed is 4294967296"),
    ([make_search("a", depth=0)], "depth is 0"),
    ([make_search("a", depth=10**9)], "use a smaller depth or width"),
    ([make_search("../../outside")], r"name of a search is '\.\.'"),
    ([make_search("a//b")], "name of a search is ''"),
    ([make_search("a\nb")], "name of a search is"),
    (
      [make_search("a", dataclasses.replace(PROTOCOL, num_seeds=2**31 - 1))],
      "asks for 4294967294 runs",
    ),
  ],
)
def test_what_can_be_known_before_the_first_run(searches, words):
  with pytest.raises(UsageError, match=words):
    check(make_study(*searches))


def test_a_network_for_images_of_one_size_alone(monkeypatch):
  class Pixels(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, images, train):
      return nn.Dense(self.num_classes)(images.reshape(-1, 8 * 8))

  monkeypatch.setitem(registry._KINDS, "pixels", registry.Kind(Pixels, "Pixels"))
  config = TrainConfig(model="pixels")
  search = Search("a", "row", "column", LABELS, config, PROTOCOL)
  check(Study("depth_study", SearchConfig(), (search,)))


def test_data_are_read_once_for_all_searches(monkeypatch):
  load, read = TrainConfig.load_dataset, []
  monkeypatch.setattr(
    TrainConfig, "load_dataset", lambda config: read.append(config) or load(config)
  )
  searches = tuple(make_search(name) for name in "abc")
  check(Study("depth_study", SearchConfig(), searches))
  assert len(read) == 1
