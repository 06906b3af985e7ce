"""The depth study: its networks, claims, published numbers and report."""

import dataclasses

import pytest

from experiments.depth_study import CONFIGS
from skipinit_jax import methods
from skipinit_jax.studies import DepthStudyConfig, SearchConfig, depth_study
from skipinit_jax.studies.depth import (
  PUBLISHED,
  DepthLabels,
  depth_claims,
  published_table,
)
from skipinit_jax.training import TrainConfig
from tests.studies.results import make_result, make_results, run_study, texts

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
  assert [search.name for search in study.searches] == [
    f"{network}/{method}"
    for network in ("wide_resnet_10_3", "wide_resnet_16_3", "residual_mlp_4_64")
    for method in ("skipinit", "batch_norm", "skipinit_without_l2")
  ]
  assert study.searches[5].title == "Wide-ResNet 16-3, SkipInit, α = 0, no L2"
  for search in study.searches:
    labels = search.labels
    base = getattr(CONFIG, labels.model)
    without_l2 = search.name.endswith("_without_l2")
    # A search changes only what it is named after.
    assert search.config == dataclasses.replace(base, **dataclasses.asdict(labels))
    assert (labels.width, labels.l2) == (base.width, 0.0 if without_l2 else 5e-4)
    assert search.protocol == getattr(CONFIG, f"{labels.model}_search")


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_have_the_methods_in_question(name):
  searches = depth_study(CONFIGS[name]()).searches
  names = {search.labels.method for search in searches}
  of_paper = {"batch_norm", "skipinit", "divide_by_sqrt2", "skipinit_one"}
  of_reviewer = {"batch_norm", "output_batch_norm", "unnormalized"}
  assert (of_reviewer if name == "output_batch_norm" else of_paper) <= names
  deepest = 100 if name == "fashion_mnist_half_cpu" else 1000
  assert max(search.labels.depth for search in searches) == deepest


def test_published_presets_follow_the_protocol():
  # Momentum 0.9, L2 5e-4, batch 64, 200 epochs, the rate constant for 100 of them and
  # then halved every 10; the best 5 of 7 seeds.
  for search in depth_study(CONFIGS["cifar10"]()).searches:
    config = search.config
    assert (config.dataset, config.batch_size, config.momentum) == ("cifar10", 64, 0.9)
    schedule = (config.epochs, config.constant_epochs, config.halve_every_epochs)
    assert schedule == (200, 100, 10)
    assert config.l2 == (0.0 if search.name.endswith("_without_l2") else 5e-4)
    assert (config.crop_padding, config.flip, config.width) == (4, True, 2)
    assert (search.protocol.num_seeds, search.protocol.best_of) == (7, 5)
    assert search.protocol.extend


# arXiv:2002.10444v1, tables 1 and 2: by depth, the accuracies and exponents of the best
# learning rates (lowest, highest) of each method; the last one without L2.
TABLE = """
batch_norm                  16 93.5 0.1 -1 -1 -1 | 100 94.7 0.1 -1 -2  0 | 1000 94.6 0.1 -2 -3  0
skipinit_inverse_sqrt_depth 16 93.0 0.1 -2 -2 -1 | 100 94.2 0.1 -1 -2 -1 | 1000 94.2 0.0 -1 -2 -1
skipinit                    16 93.3 0.1 -2 -2 -2 | 100 94.2 0.1 -2 -2 -2 | 1000 94.3 0.2 -2 -3 -1
skipinit_one                16 93.0 0.1 -2 -2 -1 | 100                   | 1000
divide_by_sqrt2             16 92.4 0.1 -2 -2 -1 | 100 88.9 0.4 -5 -5 -5 | 1000
skipinit/no_l2              16 89.8 0.2 -3 -3 -3 | 100 91.7 0.2 -2 -2 -2 | 1000 92.1 0.1 -2 -2 -2
"""  # noqa: E501


def test_every_published_number_is_the_published_one():
  expected = {}
  for line in TABLE.strip().splitlines():
    name, entries = line.split(maxsplit=1)
    method, _, without_l2 = name.partition("/")
    for entry in entries.split("|"):
      depth, *numbers = map(float, entry.split())
      expected[depth, method, not without_l2] = tuple(numbers) or None
  assert expected == PUBLISHED
  assert {method for _, method, _ in PUBLISHED} <= set(methods.NAMES)


def at_depth(method, accuracy, depth=1000, deviation=0.001, l2=5e-4):
  return make_result(
    DepthLabels("wide_resnet", depth, 2, method, l2),
    accuracy,
    deviation,
    row=f"Wide-ResNet {depth}-2",
    column=method,
  )


def findings_on(*searches):
  return depth_claims(make_results("depth_study", searches))


def test_published_table_holds_every_claim_of_the_paper():
  findings = findings_on(
    *(
      at_depth(
        method,
        published and published.accuracy / 100,
        depth,
        published and published.deviation / 100,
        5e-4 if l2 else 0.0,
      )
      for (depth, method, l2), published in PUBLISHED.items()
    )
  )
  assert len(findings) == 6 and all(each.holds for each in findings)
  # The deviations are the roots of 0.02, 0.02 and 0.05.
  assert findings[-1].evidence == (
    "Wide-ResNet 16-2: -0.2±0.1; Wide-ResNet 100-2: -0.5±0.1; "
    "Wide-ResNet 1000-2: -0.3±0.2 points."
  )


@pytest.mark.parametrize(
  ("method", "accuracies", "holds"),
  [
    # By depth: 16, 100, 1000. Shallow networks may train.
    ("skipinit", (0.9, 0.9, 0.9), True),
    ("skipinit", (0.9, 0.1, 0.9), False),
    ("output_batch_norm", (0.9, 0.9, None), False),
    ("skipinit_one", (0.9, 0.1, None), True),
    ("skipinit_one", (None, None, 0.9), False),
    ("skipinit_one", (0.9, 0.9, None), False),
    ("skipinit_one", (0.9,), None),
    ("divide_by_sqrt2", (0.9, 0.9, 0.1), True),
    ("divide_by_sqrt2", (0.9, 0.1, 0.9), False),
    ("divide_by_sqrt2", (0.9, 0.9), None),
  ],
)
def test_what_trains_at_which_depth(method, accuracies, holds):
  depths = (16, 100, 1000)[: len(accuracies)]
  (finding,) = findings_on(*map(at_depth, [method] * 3, accuracies, depths))
  assert finding.holds is holds


@pytest.mark.parametrize(
  ("searches", "verdicts"),
  [
    ([("batch_norm", 0.95), ("skipinit", 0.945), ("skipinit", 0.5, 0.0)], [1, 1, 1]),
    ([("batch_norm", 0.95), ("skipinit", 0.9)], [1, 1, 0]),
    # What does not train is not compared.
    ([("batch_norm", 0.95), ("skipinit", 0.1)], [1, 0]),
    ([("fixup", 0.9), ("skipinit", 0.5, 0.0)], []),
  ],
)
def test_only_networks_with_l2_that_train_are_compared_with_batch_norm(
  searches, verdicts
):
  findings = findings_on(
    *(at_depth(name, value, l2=next(iter(l2), 5e-4)) for name, value, *l2 in searches)
  )
  assert [finding.holds for finding in findings] == verdicts


def small_config(**changes):
  search = SearchConfig(
    (2**-3, 2**-2),
    min_learning_rate=2**-4,
    max_learning_rate=2**-1,
    num_seeds=2,
    best_of=2,
  )
  fields = {
    "methods": ("batch_norm", "skipinit", "skipinit_one", "divide_by_sqrt2"),
    "wide_resnet_depths": (16, 100),
    "wide_resnet": TrainConfig(dataset="cifar10", width=2),
    "wide_resnet_search": search,
    "residual_mlp_search": search,
  }
  return DepthStudyConfig(**(fields | changes))


def published_accuracy(labels, rate, seed):
  """The published means, but for SkipInit's at depth 16: one point less."""
  published = PUBLISHED[labels.depth, labels.method, True]
  if published is None or (labels.depth, labels.method) == (16, "divide_by_sqrt2"):
    return None
  too_bad = (labels.depth, labels.method) == (16, "skipinit")
  value = published.accuracy / 100 - 0.01 * too_bad
  return value + 0.002 * seed - 0.01 * (rate != 2**-3)


def published_of(**changes):
  results = run_study(depth_study(small_config(**changes)), published_accuracy)
  return {tuple(row[:2]): row[2:] for row in texts(published_table(results))}


def test_published_numbers_of_the_same_networks():
  rows = published_of(methods_without_l2=("skipinit",))
  assert len(rows) == 10
  # Deviations of 0.14 and 0.1.
  expected = ["93.6±0.1, 2⁻³", "93.5±0.1, 2⁻¹", "agrees: +0.1±0.2"]
  assert rows["Wide-ResNet 16-2", "Batch norm"] == expected
  expected = ["93.3±0.1, 2⁻²", "differs: -0.9±0.2"]
  assert rows["Wide-ResNet 16-2", "SkipInit, α = 0"][1:] == expected
  assert rows["Wide-ResNet 16-2", "SkipInit, α = 0, no L2"][1] == "89.8±0.2, 2⁻³"
  ours, theirs, verdict = rows["Wide-ResNet 16-2", "Divide by √2"]
  assert ours == "does not train (diverges)"
  assert theirs == "92.4±0.1, 2⁻² (2⁻² to 2⁻¹)"
  assert verdict == "differs: does not train here"
  _, *expected = rows["Wide-ResNet 100-2", "SkipInit, α = 1"]
  assert expected == ["does not train", "neither trains"]


def test_published_numbers_of_one_seed_are_not_judged():
  search = SearchConfig((0.25, 0.125), extend=False, num_seeds=1, best_of=1)
  rows = published_of(wide_resnet_search=search)
  assert rows["Wide-ResNet 16-2", "SkipInit, α = 0"][2] == "both train, -1.0"


@pytest.mark.parametrize(
  ("changes", "network"),
  [
    ({"wide_resnet": TrainConfig(width=2)}, "Wide-ResNet 16-2"),
    ({"wide_resnet": TrainConfig(dataset="cifar10", width=4)}, "Wide-ResNet 16-4"),
    ({"wide_resnet_depths": (), "residual_mlp_depths": (16, 100)}, "MLP 16-64"),
  ],
)
def test_elsewhere_only_what_trains_is_compared(changes, network):
  rows = published_of(**changes)
  assert rows[network, "SkipInit, α = 0"][2] == "both train"
  assert rows[network, "Divide by √2"][2] == "differs: does not train here"
  other = network.replace("16", "100")
  assert rows[other, "SkipInit, α = 1"][2] == "neither trains"


def test_where_nothing_is_published_there_is_no_comparison():
  study = depth_study(small_config(wide_resnet_depths=(10,)))
  assert published_table(run_study(study, lambda *_: 0.9)) is None
