"""The branch-scale study: its combinations and how they are named."""

import dataclasses

import pytest

from experiments.configs.branch_scale_study import CONFIGS
from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import (
  BranchScaleStudyConfig,
  SearchConfig,
  branch_scale_study,
)
from skipinit_jax.studies.names import format_alpha
from skipinit_jax.studies.study import check
from skipinit_jax.training import TrainConfig

CONFIG = BranchScaleStudyConfig(
  methods=("skipinit", "batch_norm"),
  alphas=(1, 2**-0.5, 2**-3),
  learnable=(True, False),
  references=("divide_by_sqrt2",),
  depths=(4, 8),
  train=TrainConfig(model="residual_mlp", width=16, epochs=3, l2=0.25),
)


def replace(**changes):
  return dataclasses.replace(CONFIG, **changes)


def test_every_combination_and_its_names():
  study = branch_scale_study(CONFIG)
  assert study.name == "branch_scale_study"
  expected = []
  for depth in (4, 8):
    expected += [
      f"residual_mlp_{depth}/{method}/{kind}/alpha_{alpha}"
      for method in ("skipinit", "batch_norm")
      for kind in ("learnable", "constant")
      for alpha in ("1.0", "0.7071067811865476", "0.125")
    ]
    expected.append(f"residual_mlp_{depth}/divide_by_sqrt2/as_it_is")
  assert [search.name for search in study.searches] == expected
  rows = list(dict.fromkeys(search.row for search in study.searches))
  assert rows[:5] == [
    "MLP 4-16, SkipInit, learnable α",
    "MLP 4-16, SkipInit, constant α",
    "MLP 4-16, Batch norm, learnable α",
    "MLP 4-16, Batch norm, constant α",
    "MLP 4-16, as it is",
  ]
  columns = list(dict.fromkeys(search.column for search in study.searches))
  assert columns == ["α = 1", "α = 0.707", "α = 2^-3", "Divide by √2"]
  check(study)


def test_a_search_changes_only_what_it_is_named_after():
  for search in branch_scale_study(CONFIG).searches:
    labels = search.labels
    assert search.config == dataclasses.replace(
      CONFIG.train,
      depth=labels["depth"],
      method=labels["method"],
      alpha=labels["alpha"],
      learnable_alpha=labels["learnable"],
    )
    method = search.config.make_method()
    known = methods.get(labels["method"])
    if labels["alpha"] is None:
      assert method == known
    else:
      assert (method.alpha, method.learnable_alpha) == (
        labels["alpha"],
        labels["learnable"],
      )
      assert method.normalizer is known.normalizer
    assert search.protocol == CONFIG.search


@pytest.mark.parametrize(
  ("alpha", "text"), [(0.0, "0"), (1.0, "1"), (2.0, "2"), (0.25, "2^-2"), (0.3, "0.3")]
)
def test_alpha_is_named_shortly(alpha, text):
  assert format_alpha(alpha) == text


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ()}, "methods is empty: name at least one."),
    ({"alphas": ()}, "alphas is empty: name at least one."),
    ({"learnable": ()}, "learnable is empty: name at least one."),
    ({"depths": ()}, "depths is empty: name at least one."),
    ({"alphas": (0, 0.0)}, "alphas is (0, 0.0): it names a value twice."),
    ({"learnable": (1,)}, "learnable has 1: each must be True or False."),
    (
      {"train": TrainConfig(alpha=0.5)},
      "train.alpha is 0.5, which this study sets itself: use alphas.",
    ),
    (
      {"search": SearchConfig(num_seeds=0)},
      "search.num_seeds is 0: it must be at least 1.",
    ),
  ],
)
def test_bad_configuration_is_one_sentence(changes, message):
  with pytest.raises(UsageError) as error:
    branch_scale_study(replace(**changes))
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"alphas": (-1.0,)}, "alpha is -1.0: it must be finite and not negative."),
    ({"depths": (0,)}, "depth is 0: it must be at least 1."),
  ],
)
def test_impossible_networks_are_known_before_the_first_run(changes, message):
  with pytest.raises(UsageError) as error:
    check(branch_scale_study(replace(**changes)))
  assert str(error.value) == message


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_can_be_run(name):
  study = branch_scale_study(CONFIGS[name]())
  check(study)
  depths = {search.labels["depth"] for search in study.searches}
  expected = {"learnable_alpha_wide_resnet": {16, 40}, "transformer": {64}}
  assert depths >= expected.get(name, {100, 1000})
