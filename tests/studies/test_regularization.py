"""The regularization study: its combinations and how they are named."""

import dataclasses

import pytest

from experiments.configs.regularization_study import CONFIGS
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import (
  RegularizationStudyConfig,
  SearchConfig,
  regularization_study,
)
from skipinit_jax.studies.study import check
from skipinit_jax.training import TrainConfig

CONFIG = RegularizationStudyConfig(train=TrainConfig(epochs=3, l2=0.25))


def replace(**changes):
  return dataclasses.replace(CONFIG, **changes)


def test_every_combination_and_its_names():
  study = regularization_study(CONFIG)
  assert study.name == "regularization_study"
  assert [search.name for search in study.searches] == [
    f"{method}/{biases}/dropout_{rate}"
    for method in ("batch_norm", "skipinit", "skipinit_without_l2")
    for biases in ("no_biases", "biases")
    for rate in (0.0, 0.2, 0.6)
  ]
  rows = [search.row for search in study.searches[::3]]
  assert rows == [
    "Batch norm, no biases",
    "Batch norm, biases",
    "SkipInit, α = 0, no biases",
    "SkipInit, α = 0, biases",
    "SkipInit, α = 0, no biases, no L2",
    "SkipInit, α = 0, biases, no L2",
  ]
  assert [search.column for search in study.searches[:3]] == [
    "no dropout",
    "dropout 0.2",
    "dropout 0.6",
  ]
  check(study)


def test_a_search_changes_only_what_it_is_named_after():
  for search in regularization_study(CONFIG).searches:
    labels = search.labels
    assert search.config == dataclasses.replace(CONFIG.train, **labels)
    assert labels["l2"] == (0.0 if "_without_l2" in search.name else 0.25)
    # What its name says is what the network has.
    method = search.config.make_method()
    assert method.use_bias == ("/biases/" in search.name)
    assert search.name.endswith(f"dropout_{method.dropout_rate}")
    assert search.protocol == CONFIG.search


def test_whole_numbers_name_the_same_runs():
  names = [
    [search.name for search in regularization_study(config).searches]
    for config in (replace(dropout_rates=(0,)), replace(dropout_rates=(0.0,)))
  ]
  assert names[0] == names[1]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"methods": (), "methods_without_l2": ()},
      "methods is empty: name at least one method.",
    ),
    ({"use_bias": ()}, "use_bias is empty: name at least one."),
    ({"dropout_rates": ()}, "dropout_rates is empty: name at least one."),
    ({"dropout_rates": (0, 0.0)}, "dropout_rates is (0, 0.0): it names a value twice."),
    ({"dropout_rates": ("0",)}, "dropout_rates has '0': each must be a number."),
    ({"use_bias": (1,)}, "use_bias has 1: each must be True or False."),
    (
      {"train": TrainConfig(use_bias=True)},
      "train.use_bias is True, which this study sets itself: use use_bias.",
    ),
    (
      {"train": TrainConfig(dropout_rate=0.5)},
      "train.dropout_rate is 0.5, which this study sets itself: use dropout_rates.",
    ),
    (
      {"train": TrainConfig(method="fixup")},
      "train.method is fixup, which this study sets itself: use methods.",
    ),
    (
      {"train": TrainConfig(l2=0.0)},
      "methods_without_l2 is ('skipinit',), but train.l2 is 0: name them in methods.",
    ),
    (
      {"search": SearchConfig(num_seeds=0)},
      "search.num_seeds is 0: it must be at least 1.",
    ),
  ],
)
def test_bad_configuration_is_one_sentence(changes, message):
  with pytest.raises(UsageError) as error:
    regularization_study(replace(**changes))
  assert str(error.value) == message


def test_dropout_of_everything_is_known_before_the_first_run():
  with pytest.raises(UsageError, match=r"dropout_rate is 1\.0: it must be below 1"):
    check(regularization_study(replace(dropout_rates=(0.5, 1))))


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_can_be_run(name):
  config = CONFIGS[name]()
  assert config.train.dataset == name
  study = regularization_study(config)
  check(study)
  # The dropout rates that the reviews name, and none.
  assert {search.labels["dropout_rate"] for search in study.searches} == {0, 0.2, 0.6}
