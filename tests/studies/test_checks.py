"""What is checked in the configuration of every study."""

import dataclasses

import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.studies import SearchConfig
from skipinit_jax.studies.checks import check_config, with_and_without_l2
from skipinit_jax.training import TrainConfig


@dataclasses.dataclass
class Config:
  """A study's configuration with a list of each type."""

  methods: tuple[str, ...] = ("skipinit",)
  depths: tuple[int, ...] = (2,)
  alphas: tuple[float, ...] = (0.5,)
  learnable: tuple[bool, ...] = (True,)
  references: tuple[str, ...] = ()
  train: TrainConfig = dataclasses.field(default_factory=lambda: TrainConfig(width=4))
  search: SearchConfig = dataclasses.field(default_factory=SearchConfig)


def check(**changes):
  varied = {"method": "methods", "width": "widths"}
  check_config(Config(**changes), varied=varied, optional=["references"])


def test_good_configurations():
  check()
  # A whole number is a number too, and other fields of a run are free.
  check(alphas=(0, 1, 0.5), train=TrainConfig(width=4, epochs=3))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ()}, "methods is empty: name at least one."),
    ({"methods": (3,)}, "methods has 3: each must be a name."),
    ({"depths": (10, 10)}, "depths is (10, 10): it names a value twice."),
    ({"alphas": (0, 0.0)}, "alphas is (0, 0.0): it names a value twice."),
    ({"depths": (8.5,)}, "depths has 8.5: each must be a whole number."),
    ({"depths": (True,)}, "depths has True: each must be a whole number."),
    ({"alphas": ("0",)}, "alphas has '0': each must be a number."),
    ({"learnable": (1,)}, "learnable has 1: each must be True or False."),
    (
      {"train": TrainConfig(width=4, method="fixup")},
      "train.method is fixup, which this study sets itself: use methods.",
    ),
    ({"train": TrainConfig()}, "train.width is 1, which this study sets itself: use"),
    ({"search": SearchConfig(num_seeds=0)}, "search.num_seeds is 0: it must be at"),
  ],
)
def test_bad_configuration_is_one_sentence(changes, message):
  with pytest.raises(UsageError) as error:
    check(**changes)
  assert str(error.value).startswith(message)


def test_methods_with_and_without_l2():
  train = TrainConfig()
  names = with_and_without_l2(("a", "b"), ("a",), train=train)
  assert names == [("a", True), ("b", True), ("a", False)]
  with pytest.raises(UsageError, match="methods is empty: name at least one method"):
    with_and_without_l2((), (), train=train)
  with pytest.raises(UsageError, match=r"\('a',\), but train.l2 is 0: name them in"):
    with_and_without_l2((), ("a",), train=TrainConfig(l2=0.0))
