"""The branch-scale study: its combinations, claims and report."""

import dataclasses
import functools

import pytest

from experiments.branch_scale_study import CONFIGS
from skipinit_jax import methods
from skipinit_jax.studies import BranchScaleStudyConfig, branch_scale_study
from skipinit_jax.studies.branch_scale import BranchScaleLabels, branch_scale_claims
from skipinit_jax.training import TrainConfig
from tests.studies.results import make_result, make_results, verdicts

CONFIG = BranchScaleStudyConfig(
  methods=("skipinit", "batch_norm"),
  alphas=(1, 2**-0.5, 2**-3),
  learnable=(True, False),
  references=("divide_by_sqrt2",),
  depths=(4, 8),
  train=TrainConfig(model="residual_mlp", width=16, epochs=3, l2=0.25),
)


def test_every_combination_and_its_names():
  study = branch_scale_study(CONFIG)
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
  for search in study.searches:
    labels = search.labels
    # A search changes only what it is named after.
    assert search.config == dataclasses.replace(
      CONFIG.train,
      depth=labels.depth,
      method=labels.method,
      alpha=labels.alpha,
      learnable_alpha=labels.learnable,
    )
    method, known = search.config.make_method(), methods.get(labels.method)
    if labels.alpha is None:
      assert method == known
    else:
      alpha = (method.alpha, method.learnable_alpha)
      assert alpha == (labels.alpha, labels.learnable)
      assert method.normalizer is known.normalizer


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_have_the_depths_in_question(name):
  searches = branch_scale_study(CONFIGS[name]()).searches
  expected = {"learnable_alpha_wide_resnet": {16, 40}, "transformer": {64}}
  assert {each.labels.depth for each in searches} >= expected.get(name, {100, 1000})


def scaled(accuracy, alpha, learnable=False, deviation=0.001, method="batch_norm"):
  kind = "learnable" if learnable else "constant"
  return make_result(
    BranchScaleLabels(9, method, alpha, learnable),
    accuracy,
    deviation,
    row=f"MLP 9-8, {method}, {kind} α",
    column=f"α = {alpha}",
  )


def reference(method, accuracy):
  labels = BranchScaleLabels(9, method, None, None)
  title = methods.get(method).title
  return make_result(labels, accuracy, row="MLP 9-8, as it is", column=title)


def make(*searches):
  train = dataclasses.asdict(TrainConfig(model="residual_mlp", width=8))
  return make_results("branch_scale_study", searches, config={"train": train})


@pytest.mark.parametrize(
  ("accuracies", "holds", "as_accurate", "evidence"),
  [
    ((0.9, 0.901), True, True, "α = 0.5: 90.0±0.1 %; α = 1: 90.1±0.1 %"),
    ((0.9, 0.92), True, False, "α = 0.5: 90.0±0.1 %; α = 1: 92.0±0.1 %"),
    ((0.9, None), False, None, "α = 0.5: 90.0±0.1 %; α = 1: diverges"),
    ((0.1, 0.9), False, None, "α = 0.5: 10.0±0.1 %, at chance; α = 1: 90.0±0.1 %"),
  ],
)
def test_does_alpha_matter(accuracies, holds, as_accurate, evidence):
  first, *others = branch_scale_claims(make(*map(scaled, accuracies, (0.5, 1))))
  row = "MLP 9-8, batch_norm, constant α"
  assert (first.claim, first.holds) == (f"{row}: every α trains.", holds)
  assert first.evidence == evidence + "."
  expected = {} if as_accurate is None else {"is as accurate": as_accurate}
  assert {each.claim[-15:-1]: each.holds for each in others} == expected


@pytest.mark.parametrize(
  ("learnable", "constant", "holds", "evidence"),
  [
    ((0.9, 0.95), (0.85, 0.9), True, "α = 0.5: +5.0±0.1 points; α = 1: +5.0±0.1"),
    ((0.9, 0.95), (None, 0.9), True, "α = 0.5: only the learnable one trains; α = 1"),
    ((None, 0.95), (0.9, 0.9), False, "α = 0.5: only the constant one trains; α = 1"),
    ((0.898, 0.95), (0.9, 0.9), True, "α = 0.5: -0.2±0.1 points; α = 1: +5.0±0.1"),
    ((0.9, 0.95), (0.95, 0.9), False, "α = 0.5: -5.0±0.1 points; α = 1: +5.0±0.1"),
    # Where neither trains there is nothing to compare.
    ((0.1, 0.95), (None, 0.9), True, "α = 1: +5.0±0.1 points."),
  ],
)
def test_learnable_against_constant(learnable, constant, holds, evidence):
  alphas = (0.5, 1)
  findings = branch_scale_claims(
    make(
      *map(functools.partial(scaled, learnable=True), learnable, alphas),
      *map(scaled, constant, alphas),
      # Another method's constants are not compared with.
      *(scaled(0.2, alpha, method="skipinit") for alpha in alphas),
    )
  )
  claim = "MLP 9-8, batch_norm, learnable α: at least as accurate as the same constant."
  (finding,) = (each for each in findings if each.claim == claim)
  assert finding.holds is holds
  assert finding.evidence.startswith(evidence)


@pytest.mark.parametrize(("accuracy", "holds"), [(0.9, True), (0.1, False)])
def test_a_reference_trains_or_not(accuracy, holds):
  findings = branch_scale_claims(
    make(reference("batch_norm_divide_by_sqrt2", accuracy))
  )
  assert verdicts(findings) == {"MLP 9-8: Batch norm, divide by √2 trains.": holds}
