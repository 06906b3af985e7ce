"""The depth study: which networks it searches, and how they are named."""

import dataclasses

import pytest

from experiments.configs.depth_study import CONFIGS
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import DepthStudyConfig, SearchConfig, depth_study
from skipinit_jax.studies.names import format_rate, network_name
from skipinit_jax.studies.study import check
from skipinit_jax.training import TrainConfig

CONFIG = DepthStudyConfig(
  methods=("skipinit", "batch_norm"),
  methods_without_l2=("skipinit",),
  wide_resnet_depths=(10, 16),
  residual_mlp_depths=(4,),
  wide_resnet=TrainConfig(width=3, epochs=7, seed=5),
  wide_resnet_search=SearchConfig(learning_rates=(0.5, 0.25), num_seeds=3, best_of=2),
  residual_mlp_search=SearchConfig(learning_rates=(0.125,), num_seeds=2, best_of=1),
)


def test_every_network_with_every_method():
  study = depth_study(CONFIG)
  assert study.name == "depth_study"
  assert [search.name for search in study.searches] == [
    "wide_resnet_10_3/skipinit",
    "wide_resnet_10_3/batch_norm",
    "wide_resnet_10_3/skipinit_without_l2",
    "wide_resnet_16_3/skipinit",
    "wide_resnet_16_3/batch_norm",
    "wide_resnet_16_3/skipinit_without_l2",
    "residual_mlp_4_64/skipinit",
    "residual_mlp_4_64/batch_norm",
    "residual_mlp_4_64/skipinit_without_l2",
  ]
  assert [search.title for search in study.searches[3:7]] == [
    "Wide-ResNet 16-3, SkipInit, α = 0",
    "Wide-ResNet 16-3, Batch norm",
    "Wide-ResNet 16-3, SkipInit, α = 0, no L2",
    "MLP 4-64, SkipInit, α = 0",
  ]


def test_a_search_changes_only_what_it_is_named_after():
  for search in depth_study(CONFIG).searches:
    labels = search.labels
    base = getattr(CONFIG, labels["model"])
    without_l2 = search.name.endswith("_without_l2")
    assert search.config == dataclasses.replace(
      base,
      depth=labels["depth"],
      method=labels["method"],
      l2=0.0 if without_l2 else base.l2,
    )
    assert labels["l2"] == (0.0 if without_l2 else 5e-4)
    assert labels["width"] == base.width
    assert search.protocol == getattr(CONFIG, f"{labels['model']}_search")


def test_configuration_is_kept_as_plain_values():
  config = depth_study(CONFIG).config
  assert config["methods"] == ["skipinit", "batch_norm"]
  assert config["wide_resnet"]["epochs"] == 7
  assert config["wide_resnet_search"]["learning_rates"] == [0.5, 0.25]


def test_search_of_absent_networks_may_be_anything():
  depth_study(
    dataclasses.replace(
      CONFIG,
      residual_mlp_depths=(),
      residual_mlp_search=SearchConfig(learning_rates=()),
    )
  )


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_can_be_run(name):
  study = depth_study(CONFIGS[name]())
  check(study)
  methods = {search.labels["method"] for search in study.searches}
  of_paper = {"batch_norm", "skipinit", "divide_by_sqrt2", "skipinit_one"}
  of_reviewer = {"batch_norm", "output_batch_norm", "unnormalized"}
  assert (of_reviewer if name == "output_batch_norm" else of_paper) <= methods
  assert max(search.labels["depth"] for search in study.searches) == 1000


def test_published_presets_follow_the_protocol():
  # Momentum 0.9, L2 5e-4, batch 64, 200 epochs, the rate constant for 100 of them and
  # then halved every 10; the best 5 of 7 seeds.
  for search in depth_study(CONFIGS["cifar10"]()).searches:
    config = search.config
    assert (config.dataset, config.batch_size, config.momentum) == ("cifar10", 64, 0.9)
    assert (config.epochs, config.constant_epochs, config.halve_every_epochs) == (
      200,
      100,
      10,
    )
    assert config.l2 == (0.0 if search.name.endswith("_without_l2") else 5e-4)
    assert (config.crop_padding, config.flip, config.width) == (4, True, 2)
    assert (search.protocol.num_seeds, search.protocol.best_of) == (7, 5)
    assert search.protocol.extend


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"methods": (), "methods_without_l2": ()},
      "methods is empty: name at least one method.",
    ),
    (
      {"wide_resnet_depths": (), "residual_mlp_depths": ()},
      "wide_resnet_depths and residual_mlp_depths are empty: name at least one depth.",
    ),
    (
      {"methods": ("skipinit", "skipinit")},
      "methods is ('skipinit', 'skipinit'): it names a value twice.",
    ),
    (
      {"wide_resnet_depths": (10, 10)},
      "wide_resnet_depths is (10, 10): it names a value twice.",
    ),
    (
      {"wide_resnet_depths": (10.5,)},
      "wide_resnet_depths has 10.5: each must be a whole number.",
    ),
    ({"methods": (3,)}, "methods has 3: each must be a name."),
    (
      {"wide_resnet": TrainConfig(depth=40)},
      "wide_resnet.depth is 40, which this study sets itself: use wide_resnet_depths.",
    ),
    (
      {"wide_resnet": TrainConfig(method="fixup")},
      "wide_resnet.method is fixup, which this study sets itself: use methods.",
    ),
    (
      {"wide_resnet": TrainConfig(learning_rate=1.0)},
      "wide_resnet.learning_rate is 1.0, which this study sets itself: use "
      "wide_resnet_search.learning_rates.",
    ),
    (
      {"residual_mlp": TrainConfig()},
      "residual_mlp.model is wide_resnet, which this study sets itself: use "
      "wide_resnet or residual_mlp.",
    ),
    (
      {"wide_resnet_search": SearchConfig(learning_rates=())},
      "wide_resnet_search.learning_rates is empty: name at least one rate.",
    ),
    (
      {"wide_resnet": TrainConfig(l2=0.0)},
      "methods_without_l2 is ('skipinit',), but wide_resnet.l2 is 0: name them in "
      "methods.",
    ),
  ],
)
def test_bad_configuration_is_one_sentence(changes, message):
  with pytest.raises(UsageError) as error:
    depth_study(dataclasses.replace(CONFIG, **changes))
  assert str(error.value) == message


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"methods": ("skipint",)}, "Unknown method 'skipint' .did you mean 'skipinit'"),
    ({"wide_resnet_depths": (17,)}, "depth is 17"),
  ],
)
def test_unknown_names_and_impossible_depths(changes, words):
  with pytest.raises(UsageError, match=words):
    check(depth_study(dataclasses.replace(CONFIG, **changes)))


@pytest.mark.parametrize(
  ("rate", "text"),
  [
    (0.5, "2^-1"),
    (2.0**-9, "2^-9"),
    (1, "2^0"),
    (4.0, "2^2"),
    (0.3, "0.3"),
    (0.75, "0.75"),
  ],
)
def test_rates_are_named_as_powers_of_two(rate, text):
  assert format_rate(rate) == text


def test_networks_are_named_as_in_the_paper():
  assert network_name(TrainConfig(depth=16, width=4)) == "Wide-ResNet 16-4"
  assert network_name(TrainConfig(model="residual_mlp", depth=5, width=7)) == "MLP 5-7"
  assert network_name(TrainConfig(model="resnet", depth=50)) == "ResNet 50 v2"
  transformer = TrainConfig(model="vision_transformer", depth=64, width=32)
  assert network_name(transformer) == "Vision Transformer 64-32"
