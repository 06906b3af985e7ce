"""The depth study's grid and its statistics, on hand-computed cases."""

import dataclasses

import numpy as np
import pytest

from skipinit_jax import data
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import DepthStudyConfig, depth, trial_configs
from skipinit_jax.studies.names import format_rate, network_name
from skipinit_jax.studies.statistics import above_chance, chance
from skipinit_jax.training import Result, TrainConfig

STUDY = DepthStudyConfig(
  methods=("skipinit", "batch_norm"),
  wide_resnet_depths=(10, 16),
  wide_resnet_learning_rates=(0.5, 0.25),
  residual_mlp_depths=(4,),
  residual_mlp_learning_rates=(0.125,),
  num_seeds=3,
)


def summarize(results, threshold=0.15):
  return depth.summarize(results, {"digits": threshold})


def make_result(accuracy, *, rate=0.5, seed=0, method="skipinit", depth=16):
  config = TrainConfig(depth=depth, method=method, learning_rate=rate, seed=seed)
  return Result(
    status="diverged" if accuracy is None else "completed",
    step=1,
    train_loss=1.0,
    train_accuracy=0.5,
    test_loss=None if accuracy is None else 1.0,
    test_accuracy=accuracy,
    images_per_second=None,
    seconds_to_first_step=None,
    num_parameters=1,
    config=dataclasses.asdict(config),
    versions={},
    device="",
  )


def test_grid_holds_every_combination_once():
  trials = trial_configs(STUDY)
  keys = [(t.model, t.depth, t.method, t.learning_rate, t.seed) for t in trials]
  expected = {
    (model, depth, method, rate, seed)
    for model, depths, rates in (
      ("wide_resnet", (10, 16), (0.5, 0.25)),
      ("residual_mlp", (4,), (0.125,)),
    )
    for depth in depths
    for method in ("skipinit", "batch_norm")
    for rate in rates
    for seed in range(3)
  }
  assert len(keys) == len(expected) == 30
  assert set(keys) == expected


def test_grid_keeps_the_network_s_other_fields():
  study = dataclasses.replace(STUDY, wide_resnet=TrainConfig(width=3, epochs=7, seed=5))
  convolutional = [t for t in trial_configs(study) if t.model == "wide_resnet"]
  assert {(t.width, t.epochs) for t in convolutional} == {(3, 7)}
  assert {t.seed for t in convolutional} == {5, 6, 7}


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"num_seeds": 0}, "num_seeds is 0"),
    ({"methods": ()}, "methods is empty"),
    ({"methods": ("skipint",)}, "did you mean 'skipinit'"),
    ({"wide_resnet_depths": (17,)}, "depth is 17"),
    ({"wide_resnet_learning_rates": ()}, "wide_resnet_learning_rates is empty"),
    ({"wide_resnet_learning_rates": (-1.0,)}, "learning_rate is -1.0"),
    ({"methods": ("skipinit", "skipinit")}, "methods is .* names a value twice"),
    ({"wide_resnet_learning_rates": (0.5, 0.5)}, "names a value twice"),
    ({"wide_resnet": TrainConfig(depth=40)}, "wide_resnet.depth is 40"),
    ({"wide_resnet": TrainConfig(method="fixup")}, "wide_resnet.method is fixup"),
    ({"residual_mlp": TrainConfig()}, "residual_mlp.model is wide_resnet"),
    ({"wide_resnet_depths": (), "residual_mlp_depths": ()}, "at least one depth"),
  ],
)
def test_bad_grid_is_one_sentence(changes, words):
  with pytest.raises(UsageError, match=words):
    trial_configs(dataclasses.replace(STUDY, **changes))


def test_best_rate_has_the_best_mean_over_seeds():
  (cell,) = summarize(
    [
      make_result(0.9, rate=0.5, seed=0),
      make_result(0.5, rate=0.5, seed=1),
      make_result(0.8, rate=0.25, seed=0),
      make_result(0.7, rate=0.25, seed=1),
    ]
  )
  assert cell.learning_rate == 0.25
  assert cell.test_accuracy == pytest.approx(0.75)
  assert cell.deviation == pytest.approx(0.1 / np.sqrt(2))
  assert (cell.num_trials, cell.num_diverged, cell.trains) == (4, 0, True)


def test_a_diverged_seed_counts_against_its_rate():
  (cell,) = summarize(
    [
      make_result(0.9, rate=0.5, seed=0),
      make_result(None, rate=0.5, seed=1),
      make_result(0.6, rate=0.25, seed=0),
      make_result(0.6, rate=0.25, seed=1),
    ]
  )
  assert cell.learning_rate == 0.25
  assert cell.num_diverged == 1


def test_where_every_run_diverged_there_is_no_accuracy():
  (cell,) = summarize([make_result(None, rate=0.5), make_result(None, rate=0.25)])
  assert (cell.test_accuracy, cell.learning_rate, cell.trains) == (None, None, False)
  assert cell.num_diverged == cell.num_trials == 2


def test_one_seed_has_no_deviation():
  (cell,) = summarize([make_result(0.6)])
  assert cell.deviation is None


def test_cells_are_by_network_and_method():
  cells = summarize(
    [
      make_result(0.1, method="skipinit", depth=10),
      make_result(0.2, method="batch_norm", depth=10),
      make_result(0.3, method="skipinit", depth=16),
    ]
  )
  assert [(c.network, c.method, c.test_accuracy) for c in cells] == [
    ("Wide-ResNet 10-1", "skipinit", 0.1),
    ("Wide-ResNet 10-1", "batch_norm", 0.2),
    ("Wide-ResNet 16-1", "skipinit", 0.3),
  ]


def test_chance_is_the_share_of_the_most_frequent_label():
  assert chance(np.array([0, 1, 1, 2])) == 0.5


def test_a_constant_guess_does_not_train():
  labels = data.load("digits").test.labels
  share = max(float(np.mean(labels == label)) for label in range(10))
  threshold = above_chance(labels)
  error = np.sqrt(share * (1 - share) / len(labels))
  assert threshold == pytest.approx(share + 3 * error)
  assert not summarize([make_result(share)], threshold)[0].trains
  assert summarize([make_result(share + 0.1)], threshold)[0].trains


@pytest.mark.parametrize(
  ("rate", "text"),
  [(0.5, "2^-1"), (2.0**-9, "2^-9"), (1.0, "2^0"), (4.0, "2^2"), (0.3, "0.3")],
)
def test_format_rate(rate, text):
  assert format_rate(rate) == text


def test_network_name():
  assert network_name(TrainConfig(model="residual_mlp", depth=5, width=7)) == "MLP 5-7"
