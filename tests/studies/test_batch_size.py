"""The batch-size study: its rates, steps, schedules and ghost batches."""

import dataclasses
import types

import numpy as np
import pytest

from experiments.configs.batch_size_study import CONFIGS
from skipinit_jax import data
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import BatchSizeStudyConfig, SearchConfig, batch_size_study
from skipinit_jax.studies.study import check
from skipinit_jax.training import TrainConfig
from skipinit_jax.training.schedules import make_schedule

# Of `digits`: 92 batches of 16.
NUM_EXAMPLES = 1472
CONFIG = BatchSizeStudyConfig(
  methods=("batch_norm", "skipinit"),
  batch_sizes=(8, 16, 64, 256),
  ghost_batch_size=16,
  train=TrainConfig(batch_size=16, epochs=8, constant_epochs=4, halve_every_epochs=2),
  search=SearchConfig(
    learning_rates=(0.25, 0.5), min_learning_rate=0.125, max_learning_rate=4.0
  ),
)


def replace(**changes):
  return dataclasses.replace(CONFIG, **changes)


def test_every_batch_size_with_every_method_at_each_budget():
  study = batch_size_study(replace(batch_sizes=(8, 64)))
  assert study.name == "batch_size_study"
  assert [(search.name, search.row, search.column) for search in study.searches] == [
    (f"same_{budget}/batch_{size}/{method}", f"batch {size}, same {budget}", title)
    for budget in ("epochs", "steps")
    for size in (8, 64)
    for method, title in (("batch_norm", "Batch norm"), ("skipinit", "SkipInit, α = 0"))
  ]
  for search in study.searches:
    assert search.config.batch_size == search.labels["batch_size"]
    assert search.config.method == search.labels["method"]
  check(study)


def test_rates_and_their_bounds_are_in_proportion_to_the_batch_size():
  for search in batch_size_study(CONFIG).searches:
    factor = search.labels["batch_size"] / 16
    protocol = search.protocol
    assert protocol.learning_rates == (0.25 * factor, 0.5 * factor)
    assert protocol.min_learning_rate == 0.125 * factor
    assert protocol.max_learning_rate == 4 * factor
    # At a factor that is no power of two they are still factors of two apart.
  odd = batch_size_study(replace(batch_sizes=(24,), ghost_batch_size=None))
  check(odd)
  assert odd.searches[0].protocol.learning_rates == (0.375, 0.75)


def test_same_epochs_change_nothing_but_the_batch_size():
  for search in batch_size_study(replace(budgets=("epochs",))).searches:
    kept = dataclasses.replace(
      search.config, batch_size=16, method="skipinit", ghost_batch_size=None
    )
    assert kept == CONFIG.train


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_same_steps_are_the_same_steps_where_batches_divide_the_data(size):
  (search,) = batch_size_study(
    replace(methods=("skipinit",), batch_sizes=(size,), budgets=("steps",))
  ).searches
  config = search.config
  assert config.epochs * (NUM_EXAMPLES // size) == 8 * 92
  assert (config.batch_size, config.epochs) == (size, 8 * size // 16)


@pytest.mark.parametrize("size", [128, 256, 736])
def test_same_steps_are_as_close_as_whole_epochs_come(size):
  # Batches of 256 are 5 an epoch, not 92 / 16: the rest of the data is left out.
  (search,) = batch_size_study(
    replace(methods=("skipinit",), batch_sizes=(size,), budgets=("steps",))
  ).searches
  steps_per_epoch = NUM_EXAMPLES // size
  steps = search.config.epochs * steps_per_epoch
  assert abs(steps - 8 * 92) <= steps_per_epoch / 2


@pytest.mark.parametrize(
  "schedule",
  [
    {"schedule": "halving"},
    {"schedule": "constant"},
    {"schedule": "cosine", "warmup_epochs": 2},
    {"schedule": "exponential", "growth_per_epoch": 1.5},
  ],
)
@pytest.mark.parametrize("size", [8, 64, 256])
def test_same_steps_have_the_same_rate_at_every_step(schedule, size):
  train = dataclasses.replace(CONFIG.train, **schedule)
  (search,) = batch_size_study(
    replace(methods=("skipinit",), batch_sizes=(size,), budgets=("steps",), train=train)
  ).searches
  steps = np.arange(8 * 92)
  expected = [float(make_schedule(train, 92)(step)) for step in steps[::7]]
  other = make_schedule(search.config, NUM_EXAMPLES // size)
  # Cosine decays over all steps, of which batches of 256 have 0.5 % more.
  tolerance = 0.01 if schedule["schedule"] == "cosine" and size == 256 else 1e-5
  actual = [float(other(step)) for step in steps[::7]]
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=tolerance)
  assert max(expected) > 0.9
  assert min(expected) < 0.5 or schedule["schedule"] in ("constant", "exponential")


def test_evaluations_are_as_many_at_the_same_steps():
  train = dataclasses.replace(CONFIG.train, eval_every_epochs=2)
  searches = batch_size_study(
    replace(
      methods=("skipinit",), batch_sizes=(4, 8, 64), budgets=("steps",), train=train
    )
  ).searches
  # Never less than once an epoch of the smallest batches.
  assert [search.config.eval_every_epochs for search in searches] == [1, 1, 8]


def test_only_larger_batches_of_batch_norm_have_ghost_batches():
  study = batch_size_study(
    replace(methods=("batch_norm", "skipinit", "output_batch_norm", "unnormalized"))
  )
  for search in study.searches:
    normalized = search.labels["method"] in ("batch_norm", "output_batch_norm")
    larger = search.labels["batch_size"] in (64, 256)
    assert search.config.ghost_batch_size == (16 if normalized and larger else None)
  check(study)
  whole = batch_size_study(replace(ghost_batch_size=None))
  assert {search.config.ghost_batch_size for search in whole.searches} == {None}


def test_ghost_batches_divide_the_batch():
  study = batch_size_study(replace(batch_sizes=(8, 24)))
  with pytest.raises(UsageError, match="batch_size is 24: it is not a multiple of gho"):
    check(study)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ()}, "methods is empty: name at least one."),
    ({"batch_sizes": ()}, "batch_sizes is empty: name at least one."),
    ({"budgets": ()}, "budgets is empty: name at least one."),
    ({"batch_sizes": (8, 8)}, "batch_sizes is (8, 8): it names a value twice."),
    ({"batch_sizes": (8.5,)}, "batch_sizes has 8.5: each must be a whole number."),
    ({"batch_sizes": (True,)}, "batch_sizes has True: each must be a whole number."),
    (
      {"batch_sizes": (0,)},
      "batch_sizes has 0: each must be from 1 to 1472, the number of training "
      "examples.",
    ),
    (
      {"batch_sizes": (16, 2048)},
      "batch_sizes has 2048: each must be from 1 to 1472, the number of training "
      "examples.",
    ),
    (
      {"budgets": ("epoch",)},
      "Unknown budget 'epoch' (did you mean 'epochs'?): choose one of epochs, steps.",
    ),
    (
      {"train": TrainConfig(ghost_batch_size=4)},
      "train.ghost_batch_size is 4, which this study sets itself: use "
      "ghost_batch_size.",
    ),
    (
      {"train": TrainConfig(method="fixup")},
      "train.method is fixup, which this study sets itself: use methods.",
    ),
    (
      {"train": TrainConfig(learning_rate=1.0)},
      "train.learning_rate is 1.0, which this study sets itself: use "
      "search.learning_rates.",
    ),
    ({"train": TrainConfig(batch_size=0)}, "batch_size is 0: it must be at least 1."),
    (
      {"search": SearchConfig(learning_rates=(-1.0,))},
      "search.learning_rates is (-1.0,): each must be from 2^-100 to 2^100.",
    ),
    # Half an epoch is none, or one.
    (
      {"batch_sizes": (1,)},
      "batch_sizes has 1: its whole epochs come no closer than 1472 steps to the 736 "
      "of 8 epochs at batch size 16: raise train.epochs, or leave out it or the steps.",
    ),
  ],
)
def test_bad_configuration_is_one_sentence(changes, message):
  with pytest.raises(UsageError) as error:
    batch_size_study(replace(**changes))
  assert str(error.value) == message


def test_rates_beyond_all_bounds_are_known_before_the_first_run():
  search = SearchConfig(learning_rates=(2.0**99,), extend=False)
  with pytest.raises(UsageError, match=r"batch_64/batch_norm\.learning_rates is"):
    check(batch_size_study(replace(search=search)))


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_can_be_run(name, monkeypatch):
  # Of the real sizes, without the files.
  sizes = {"digits": 1472, "fashion_mnist": 60_000, "cifar10": 50_000}
  if name == "digits":
    assert data.load(name).train.num_examples == sizes[name]
  fake = types.SimpleNamespace(train=types.SimpleNamespace(num_examples=sizes[name]))
  monkeypatch.setattr(data, "load", lambda dataset, data_dir: fake)
  config = CONFIGS[name]()
  study = batch_size_study(config)
  check(study)
  assert config.train.dataset == name
  assert {search.labels["method"] for search in study.searches} == {
    "batch_norm",
    "skipinit",
    "unnormalized",
  }
  expected = config.train.epochs * (sizes[name] // config.train.batch_size)
  for search in study.searches:
    steps = search.config.epochs * (sizes[name] // search.config.batch_size)
    if search.labels["budget"] == "steps":
      assert steps == pytest.approx(expected, rel=0.02)
    assert search.protocol.until_unstable
