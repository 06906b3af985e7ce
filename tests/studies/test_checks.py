"""The configurations of all kinds of studies: what is refused, and every preset."""

import dataclasses
import types

import pytest

from experiments import (
  batch_size_study,
  branch_scale_study,
  depth_study,
  imagenet,
  regularization_study,
)
from skipinit_jax import data, studies
from skipinit_jax.errors import UsageError
from skipinit_jax.fields import take_as_usual
from skipinit_jax.studies import SearchConfig
from skipinit_jax.studies.checks import check_config
from skipinit_jax.studies.study import check
from skipinit_jax.training import TrainConfig


@dataclasses.dataclass
class Config:
  """A study's configuration with lists, of which one may be empty."""

  methods: tuple[str, ...] = ("skipinit",)
  depths: tuple[int, ...] = (2,)
  alphas: tuple[float, ...] = (0.5,)
  references: tuple[str, ...] = ()
  train: TrainConfig = dataclasses.field(default_factory=lambda: TrainConfig(width=4))
  search: SearchConfig = dataclasses.field(default_factory=SearchConfig)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"methods": ()}, "methods is empty: name at least one."),
    ({"methods": (3,)}, "methods is (3,): it must be a tuple, each a name."),
    ({"depths": (10, 10)}, "depths is (10, 10): it names a value twice."),
    ({"alphas": (0, 0.0)}, "alphas is (0, 0.0): it names a value twice."),
    ({"depths": 10}, "depths is 10: it must be a tuple, each a whole number."),
    ({"train": {"width": 4}}, "train is {'width': 4}: it must be a TrainConfig."),
    (
      {"train": TrainConfig(width=4, method="fixup")},
      "train.method is fixup, which this study sets itself: use methods.",
    ),
    ({"train": TrainConfig()}, "train.width is 1, which this study sets itself: use"),
    ({"search": SearchConfig(num_seeds=0)}, "search.num_seeds is 0: it must be at"),
  ],
)
def test_bad_list_is_one_sentence(changes, message):
  varied = {"method": "methods", "width": "widths"}
  with pytest.raises(UsageError) as error:
    check_config(Config(**changes), varied=varied, optional=["references"])
  assert str(error.value).startswith(message)


DEPTH = (
  studies.depth_study,
  studies.DepthStudyConfig(methods_without_l2=("skipinit",), wide_resnet_depths=(10,)),
)
BATCH_SIZE = (
  studies.batch_size_study,
  studies.BatchSizeStudyConfig(
    methods=("batch_norm", "skipinit"),
    batch_sizes=(8, 16, 64, 256),
    ghost_batch_size=16,
    train=TrainConfig(batch_size=16, epochs=8, constant_epochs=4, halve_every_epochs=2),
  ),
)
REGULARIZATION = studies.regularization_study, studies.RegularizationStudyConfig()
BRANCH_SCALE = studies.branch_scale_study, studies.BranchScaleStudyConfig()
IMAGENET = studies.imagenet_study, imagenet.CONFIGS["imagenet2012"]()
NO_METHODS = {"methods": (), "methods_without_l2": ()}


@pytest.mark.parametrize(
  ("kind", "changes", "words"),
  [
    (
      DEPTH,
      {"wide_resnet_depths": (), "residual_mlp_depths": ()},
      "name at least one depth",
    ),
    (DEPTH, {"wide_resnet": TrainConfig(depth=40)}, "wide_resnet.depth is 40, which"),
    (DEPTH, {"residual_mlp": TrainConfig()}, "residual_mlp.model is wide_resnet"),
    (DEPTH, {"methods": ("skipint",)}, "'skipint' .did you mean 'skipinit'"),
    (BATCH_SIZE, {"batch_sizes": (0,)}, "has 0: each must be from 1 to 1472"),
    (BATCH_SIZE, {"batch_sizes": (16, 2048)}, "has 2048: each must be from 1 to"),
    (BATCH_SIZE, {"budgets": ("epoch",)}, "'epoch' .did you mean 'epochs'"),
    (
      BATCH_SIZE,
      {"train": TrainConfig(ghost_batch_size=4)},
      "train.ghost_batch_size is 4, which",
    ),
    (BATCH_SIZE, {"batch_sizes": (8, 24)}, "24: it is not a multiple of ghost"),
    # Half an epoch is none, or one.
    (BATCH_SIZE, {"batch_sizes": (1,)}, "no closer than 1472 steps to the 736 of 8"),
    (
      BATCH_SIZE,
      {"search": SearchConfig(learning_rates=(2.0**99,), extend=False)},
      r"batch_64/batch_norm\.learning_rates is",
    ),
    (REGULARIZATION, NO_METHODS, "methods is empty: name at least one method"),
    (REGULARIZATION, {"train": TrainConfig(use_bias=True)}, "train.use_bias is True"),
    (REGULARIZATION, {"train": TrainConfig(l2=0.0)}, "but train.l2 is 0: name them in"),
    (BRANCH_SCALE, {"train": TrainConfig(alpha=0.5)}, "train.alpha is 0.5, which this"),
    (BRANCH_SCALE, {"train": TrainConfig(freeze=("none",))}, "freeze is none"),
    (BRANCH_SCALE, {"alphas": (-1.0,)}, "alpha is -1.0: it must be finite in float32"),
    (IMAGENET, {"batch_sizes": (0,)}, "batch_sizes has 0: each must be at least 1"),
    (IMAGENET, {"num_seeds": 0}, "num_seeds is 0"),
    (IMAGENET, {"train": TrainConfig(method="fixup")}, "train.method is fixup.* use"),
  ],
)
def test_bad_configuration_is_one_sentence(kind, changes, words):
  make_study, config = kind
  with pytest.raises(UsageError, match=words):
    check(make_study(dataclasses.replace(config, **changes)))


def replaced(config, path, value):
  """Returns a configuration with another value of a field, by its dotted name."""
  name, _, rest = path.partition(".")
  if rest:
    value = replaced(getattr(config, name), rest, value)
  return dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
  ("kind", "changes"),
  [
    (DEPTH, {"residual_mlp_search.num_seeds": 8}),
    (DEPTH, {"residual_mlp.width": 8}),
    (DEPTH, {"wide_resnet.schedule": "cosine", "wide_resnet.constant_epochs": 3.0}),
    (
      DEPTH,
      {"wide_resnet_search.extend": False}
      | {"wide_resnet_search.max_learning_rate": 4.0},
    ),
    (BATCH_SIZE, {"methods": ("skipinit",), "ghost_batch_size": 32}),
    (BRANCH_SCALE, {"train.depth": 40}),
  ],
)
def test_field_without_effect(kind, changes):
  make_study, config = kind
  for path, value in changes.items():
    config = replaced(config, path, value)
  with pytest.raises(UsageError) as error:
    check(make_study(config))
  # The last change is the one that the others, or the study, leave without effect.
  assert str(error.value).startswith(f"{path} is {value!r}, which changes no run ")
  # A named configuration may say it.
  check(make_study(take_as_usual(config)))


def test_field_with_an_effect_on_some_runs():
  make_study, config = DEPTH
  # Another search of the study has no L2.
  check(make_study(replaced(config, "wide_resnet.l2_exempt", ("bias",))))
  # One of two methods has scales; without it, no network has any.
  scales = replaced(config, "wide_resnet.scale_rate_factor", 0.5)
  check(make_study(dataclasses.replace(scales, methods=("skipinit", "unnormalized"))))
  without = {"methods": ("unnormalized",), "methods_without_l2": ()}
  with pytest.raises(UsageError, match=r"^wide_resnet.scale_rate_factor is 0.5: no "):
    check(make_study(dataclasses.replace(scales, **without)))


@pytest.mark.parametrize(
  "program",
  [depth_study, batch_size_study, regularization_study, branch_scale_study, imagenet],
)
def test_every_preset_can_be_run(program, monkeypatch):
  def load(name, data_dir=None):
    # The real sizes of what the batch-size study counts, without the files.
    sizes = {"digits": 1472, "fashion_mnist": 60_000, "cifar10": 50_000}
    sizes["fashion_mnist_quarter_2048"] = 2048
    train = types.SimpleNamespace(num_examples=sizes.get(name, 16_384))
    return types.SimpleNamespace(train=train, image_shape=(28, 28, 1))

  monkeypatch.setattr(data, "load", load)
  for config in program.CONFIGS.values():
    study = program.main.make_study(config())
    check(study)
    if program is batch_size_study:
      assert all(search.protocol.until_unstable for search in study.searches)
