"""What a study says about each claim, on results that hold, do not, or cannot tell."""

import functools

import pytest

from skipinit_jax import methods
from skipinit_jax.studies import Optimum, RateSummary, SearchResult, StudyResults
from skipinit_jax.studies.findings import (
  batch_size_findings,
  branch_scale_findings,
  depth_findings,
  format_stable_rate,
  regularization_findings,
)
from skipinit_jax.studies.published import DEPTH_TABLE

ALL_RATES = tuple(2.0**exponent for exponent in range(-12, 5))


def make_search(
  method,
  accuracy,
  deviation=0.001,
  *,
  row="",
  column="",
  rate=2**-4,
  within=None,
  tried=ALL_RATES,
  stable=None,
  trains=None,
  **labels,
):
  """A search's result; the accuracy and its deviation are from 0 to 1."""
  low, high = within or (rate, rate)
  trains = accuracy is not None and accuracy > 0.2 if trains is None else trains
  return SearchResult(
    name="",
    row=row,
    column=column or methods.get(method).title,
    labels={"method": method, "l2": 5e-4} | labels,
    best_of=2,
    extends=True,
    rates=[RateSummary(each, 2, 0, 0.5, 0.1, 0.5, 0.1) for each in tried],
    optimum=None
    if accuracy is None
    else Optimum(
      "test_accuracy",
      accuracy,
      deviation,
      rate,
      low,
      high,
      tried[0] < rate < tried[-1],
    ),
    largest_stable_rate=(stable or rate) if trains else None,
    test_accuracy=accuracy,
    test_accuracy_deviation=deviation,
    train_loss=0.1,
    train_loss_deviation=0.01,
    trains=trains,
    num_runs=4,
    num_diverged=0,
  )


def make_results(name, searches):
  return StudyResults(name, "", {}, 0.2, list(searches), [], {}, [])


def verdicts(findings):
  return {finding.claim: finding.holds for finding in findings}


def depth(*searches):
  return depth_findings(make_results("depth_study", searches))


def at_depth(method, accuracy, depth=1000, deviation=0.001, **labels):
  row = f"Wide-ResNet {depth}-2"
  return make_search(method, accuracy, deviation, row=row, depth=depth, **labels)


def test_published_table_holds_every_claim_of_the_paper():
  findings = depth(
    *(
      at_depth(
        each.method,
        None if each.test_accuracy is None else each.test_accuracy / 100,
        each.depth,
        None if each.deviation is None else each.deviation / 100,
        l2=5e-4 if each.l2 else 0.0,
      )
      for each in DEPTH_TABLE
    )
  )
  assert verdicts(findings) == {
    "Batch norm trains at every depth.": True,
    "SkipInit, α = 0 trains at every depth.": True,
    "SkipInit, α = 1/√d trains at every depth.": True,
    "SkipInit, α = 1 does not train at a depth of 100 or more.": True,
    "Divide by √2 does not train at a depth of 1000 or more.": True,
    "SkipInit, α = 0, is at most 0.5 percentage points less accurate than batch "
    "norm.": True,
  }
  evidence = findings[-1].evidence
  # The deviations are the roots of 0.02, 0.02 and 0.05.
  assert evidence == (
    "Wide-ResNet 16-2: -0.2±0.1; Wide-ResNet 100-2: -0.5±0.1; "
    "Wide-ResNet 1000-2: -0.3±0.2 points."
  )


def test_a_method_trains_at_every_depth_or_not():
  finding, *_ = depth(at_depth("skipinit", 0.9, 16), at_depth("skipinit", 0.1, 100))
  assert finding.claim == "SkipInit, α = 0 trains at every depth."
  assert finding.holds is False
  assert finding.evidence == (
    "Wide-ResNet 16-2: 90.0±0.1 %; Wide-ResNet 100-2: 10.0±0.1 %, at chance."
  )
  (finding,) = depth(at_depth("batch_norm", None))
  assert (finding.holds, finding.evidence) == (False, "Wide-ResNet 1000-2: diverges.")
  (finding,) = depth(at_depth("batch_norm", 0.9, deviation=None))
  assert (finding.holds, finding.evidence) == (True, "Wide-ResNet 1000-2: 90.0 %.")


@pytest.mark.parametrize(
  ("accuracies", "holds"),
  [
    # By depth: 16, 100, 1000. Shallow networks may train.
    ((0.9, None, None), True),
    ((0.9, 0.1, None), True),
    ((None, None, 0.9), False),
    ((0.9, 0.9, None), False),
    ((0.9,), None),
  ],
)
def test_alpha_one_does_not_train_at_depth_100(accuracies, holds):
  searches = [
    at_depth("skipinit_one", accuracy, depth)
    for accuracy, depth in zip(accuracies, (16, 100, 1000), strict=False)
  ]
  (finding,) = depth(*searches)
  assert finding.claim == "SkipInit, α = 1 does not train at a depth of 100 or more."
  assert finding.holds is holds
  if holds is None:
    assert finding.evidence == "No network is so deep."


@pytest.mark.parametrize(
  ("accuracies", "holds"),
  [((0.9, 0.9, 0.1), True), ((0.9, 0.1, 0.9), False), ((0.9, 0.9), None)],
)
def test_division_by_sqrt2_does_not_train_at_depth_1000(accuracies, holds):
  searches = [
    at_depth("divide_by_sqrt2", accuracy, depth)
    for accuracy, depth in zip(accuracies, (16, 100, 1000), strict=False)
  ]
  (finding,) = depth(*searches)
  assert finding.claim == "Divide by √2 does not train at a depth of 1000 or more."
  assert finding.holds is holds


@pytest.mark.parametrize(
  ("skipinit", "deviation", "holds"),
  [
    (0.949, 0.0, True),
    (0.945, 0.001, True),
    # Above batch norm, by more than its uncertainty.
    (0.99, 0.01, True),
    # Below the bound by 2 points: by many deviations, by one, or who knows.
    (0.925, 0.001, False),
    (0.925, 0.02, None),
    (0.935, 0.007, None),
    (0.925, None, None),
    # Within the bound, but the difference is uncertain by more than the bound.
    (0.949, 0.03, None),
    (0.95, None, None),
  ],
)
def test_accuracy_of_skipinit_against_batch_norm(skipinit, deviation, holds):
  *_, finding = depth(
    at_depth("batch_norm", 0.95, deviation=0.0),
    at_depth("skipinit", skipinit, deviation=deviation),
    # Without L2 it is another network.
    at_depth("skipinit", 0.5, l2=0.0),
  )
  assert finding.claim.startswith("SkipInit, α = 0, is at most 0.5 percentage points")
  assert finding.holds is holds


def test_one_clear_gap_is_enough_and_an_unclear_one_leaves_it_open():
  def findings(*gaps):
    searches = []
    for index, (gap, error) in enumerate(gaps):
      searches += [
        at_depth("batch_norm", 0.9, index, 0.0),
        at_depth("skipinit", 0.9 + gap, index, error),
      ]
    return depth(*searches)[-1].holds

  assert findings((0.0, 0.001), (0.0, 0.001)) is True
  assert findings((0.0, 0.001), (-0.1, 0.001)) is False
  assert findings((0.0, 0.001), (0.0, 0.1)) is None
  assert findings((0.0, 0.1), (-0.1, 0.001)) is False


def test_networks_that_do_not_train_have_no_gap():
  claims = verdicts(depth(at_depth("batch_norm", 0.9), at_depth("skipinit", 0.1)))
  assert claims == {
    "Batch norm trains at every depth.": True,
    "SkipInit, α = 0 trains at every depth.": False,
  }


def test_study_of_other_methods_has_no_findings():
  assert depth(at_depth("fixup", 0.9), at_depth("skipinit", 0.9, l2=0.0)) == []


SIZES = (16, 32, 64, 128, 256, 512, 1024)


def at_batch_size(method, size, accuracy=0.9, deviation=0.001, **fields):
  fields = {"budget": "epochs"} | fields
  return make_search(method, accuracy, deviation, batch_size=size, **fields)


def batches(*searches):
  return batch_size_findings(make_results("batch_size_study", searches))


def linear(exponents, sizes=SIZES, **fields):
  """The finding on proportionality, from the optimal rates by batch size."""
  finding, *rest = batches(
    *(
      at_batch_size("skipinit", size, rate=2.0**exponent, **fields)
      for size, exponent in zip(sizes, exponents, strict=True)
    )
  )
  assert rest == []
  assert finding.claim == (
    "SkipInit, α = 0: below a threshold, the optimal learning rate is proportional to "
    "the batch size."
  )
  return finding


def test_optimal_rate_in_proportion_to_the_batch_size():
  # Proportional up to a threshold, then constant.
  finding = linear((-6, -5, -4, -3, -3, -3, -3))
  assert finding.holds is True
  assert finding.evidence == (
    "From batch size 16 to 128 the optimal rate goes from 2^-6 to 2^-3: it grows as "
    "the batch size to the power 1.00."
  )
  # 3 sizes at least decide, although 3 of 4 are more than half.
  assert linear((-6, -5, -4, -4), SIZES[:4]).holds is True
  # The order of the searches means nothing.
  assert linear((-3, -4, -5, -6), SIZES[3::-1]).holds is True


def test_optimal_rate_that_does_not_grow_or_grows_faster():
  finding = linear((-4, -4, -4, -4, -3, -2, -1))
  assert finding.holds is False
  assert "to the power 0.00." in finding.evidence
  assert linear((-8, -6, -4, -2, -2, -2, -2)).holds is False


def test_ranges_of_the_optimal_rates_may_leave_it_open():
  # 2^-4 throughout, but within a deviation also half and twice of it: over three
  # doublings of the batch size the power is from -2/3 to 2/3.
  finding = linear((-4,) * 7, within=(2**-5, 2**-3))
  assert finding.holds is None
  assert "to the power 0.00 (-0.67 to 0.67 within its ranges)." in finding.evidence


@pytest.mark.parametrize("changes", [{"trains": False}, {"tried": (2**-4, 2**-3)}])
def test_networks_that_say_nothing_on_the_optimal_rate(changes):
  # At chance, or with a best rate at the edge of what was tried. A grid of one rate in
  # proportion to the batch size would otherwise prove proportionality.
  fields = {"trains": None, "tried": ALL_RATES} | changes
  finding = linear((-4, -4, -4), SIZES[:3], **fields)
  assert finding.holds is None
  assert finding.evidence == (
    "Fewer than three batch sizes train with a best rate inside those tried."
  )


def pair(size, norm, skip, **fields):
  """Batch norm and SkipInit at one batch size, each with its own fields."""
  return [
    at_batch_size("batch_norm", size, **{**fields, **norm}),
    at_batch_size("skipinit", size, **{**fields, **skip}),
  ]


def finding_of(findings, words):
  found = [finding for finding in findings if words in finding.claim]
  return found[0] if found else None


@pytest.mark.parametrize(
  ("stable", "highest", "holds"),
  [
    # The largest stable rates of batch norm and SkipInit at both batch sizes, and the
    # highest rates that were tried.
    ((0, -2, 1, -2), (2, 2), True),
    ((0, -2, -2, -2), (2, 2), False),
    ((0, -2, -3, -2), (2, 2), False),
    # SkipInit was stable at the highest rate that was tried.
    ((0, -2, 1, -2), (2, -2), None),
    # Batch norm was, and is already above SkipInit, or may be.
    ((1, -2, 1, -2), (1, 2), True),
    ((-2, -2, -2, -2), (-2, 2), None),
  ],
)
def test_batch_norm_is_stable_at_larger_rates(stable, highest, holds):
  tried = [ALL_RATES[: ALL_RATES.index(2.0**each) + 1] for each in highest]
  rates = [2.0**each for each in stable]
  findings = batches(
    *pair(
      16,
      {"stable": rates[0], "tried": tried[0]},
      {"stable": rates[1], "tried": tried[1]},
    ),
    *pair(
      32,
      {"stable": rates[2], "tried": tried[0]},
      {"stable": rates[3], "tried": tried[1]},
    ),
  )
  finding = finding_of(findings, "stable at larger learning rates")
  assert finding.holds is holds


def test_stable_rate_of_which_only_a_bound_is_known():
  searches = [
    make_search("skipinit", 0.9, stable=2**-2, tried=ALL_RATES),
    make_search("skipinit", 0.9, stable=2**-2, tried=(2**-4, 2**-2)),
    make_search("skipinit", 0.1),
  ]
  assert [format_stable_rate(each) for each in searches] == ["2^-2", "≥ 2^-2", "none"]


@pytest.mark.parametrize(
  ("norm", "skip", "holds"),
  [
    ({"rate": 2**-4}, {"rate": 2**-4}, True),
    ({"rate": 2**-3}, {"rate": 2**-4}, True),
    ({"rate": 2**-5}, {"rate": 2**-4}, True),
    ({"rate": 2**-2}, {"rate": 2**-4}, False),
    ({"rate": 2**-6}, {"rate": 2**-4}, False),
    # Their ranges are within a factor of two.
    ({"rate": 2**-2, "within": (2**-3, 2**-2)}, {"rate": 2**-4}, None),
    # A best rate at the edge of what was tried.
    ({"rate": 2**-4, "tried": (2**-5, 2**-4)}, {"rate": 2**-4}, None),
    ({"rate": 2**-2}, {"rate": 2**-4, "tried": (2**-5, 2**-4)}, None),
  ],
)
def test_same_optimal_rates_at_the_smallest_batch_size(norm, skip, holds):
  findings = batches(
    # At larger batch sizes they may differ.
    *pair(64, {"rate": 1.0}, {"rate": 2**-4}),
    *pair(16, norm, skip),
  )
  finding = finding_of(findings, "At the smallest batch size")
  assert finding.holds is holds
  assert finding.evidence.startswith("Batch 16: 2^")


@pytest.mark.parametrize(
  ("small", "large", "deviation", "holds"),
  [
    # Accuracies of batch norm and SkipInit.
    ((0.95, 0.94), (0.93, 0.85), 0.001, True),
    ((0.95, 0.90), (0.93, 0.92), 0.001, False),
    # The gap grows from 0 to 1, its deviation is 2 root 4, that is 2, or unknown.
    ((0.95, 0.95), (0.95, 0.94), 0.01, None),
    ((0.95, 0.94), (0.93, 0.85), None, None),
  ],
)
def test_large_rates_pay_at_large_batches(small, large, deviation, holds):
  findings = batches(
    *pair(16, {"accuracy": small[0]}, {"accuracy": small[1]}, deviation=deviation),
    *pair(256, {"accuracy": large[0]}, {"accuracy": large[1]}, deviation=deviation),
  )
  finding = finding_of(findings, "pay at large batch sizes")
  assert finding.holds is holds
  if holds:
    assert finding.evidence == "Batch 16: +1.0±0.1 points, batch 256: +8.0±0.1 points."


def test_rates_are_compared_at_the_same_epochs():
  epochs = pair(16, {"rate": 2**-4}, {"rate": 2**-4})
  steps = pair(16, {"rate": 1.0}, {"rate": 2**-4}, budget="steps")
  compared = "At the smallest batch size"
  assert finding_of(batches(*steps, *epochs), compared).holds is True
  assert finding_of(batches(*steps), compared).holds is False


def test_what_needs_both_methods_is_left_out_without_one():
  findings = batches(*(at_batch_size("skipinit", size) for size in SIZES))
  assert len(findings) == 1
  # Nor do networks at chance count.
  findings = batches(*pair(16, {}, {"accuracy": 0.1}))
  assert [finding.holds for finding in findings] == [None, None]


def regularized(method, accuracy, use_bias, dropout, l2=5e-4, deviation=0.001):
  return make_search(
    method,
    accuracy,
    deviation,
    row=f"{method} {'biases' if use_bias else 'no biases'}",
    column=f"dropout {dropout}",
    use_bias=use_bias,
    dropout_rate=dropout,
    l2=l2,
  )


def regularization(*searches):
  return regularization_findings(make_results("regularization_study", searches))


@pytest.mark.parametrize(
  ("plain", "both", "deviation", "holds"),
  [
    (0.9, 0.92, 0.001, True),
    (0.92, 0.9, 0.001, False),
    (0.9, 0.92, 0.02, None),
    (0.9, 0.92, None, None),
    (None, 0.9, 0.001, True),
    (0.9, None, 0.001, False),
    (None, None, 0.001, None),
  ],
)
def test_biases_and_dropout_together(plain, both, deviation, holds):
  findings = regularization(
    regularized("skipinit", plain, False, 0.0, deviation=deviation),
    regularized("skipinit", both, True, 0.6, deviation=deviation),
    # The better of two dropout rates counts; none of these does.
    regularized("skipinit", 0.3, True, 0.2),
    regularized("skipinit", 0.99, True, 0.0),
    regularized("skipinit", 0.99, False, 0.6),
    regularized("skipinit", 0.99, True, 0.6, l2=0.0),
    regularized("batch_norm", 0.99, True, 0.6),
  )
  if both is None:
    # The other dropout rate trains, worse than the plain network or better.
    holds = plain is None
  finding = finding_of(findings, "Biases and dropout together")
  assert finding.holds is holds


@pytest.mark.parametrize(
  ("with_l2", "without", "holds", "evidence"),
  [
    (
      0.9,
      0.88,
      True,
      "skipinit no biases, dropout 0.0: 90.0±0.1 %; skipinit no biases, dropout 0.0: "
      "88.0±0.1 %; difference +2.0±0.1 points.",
    ),
    (0.88, 0.9, False, None),
    (0.9, 0.9, None, None),
    (
      0.9,
      None,
      True,
      "skipinit no biases, dropout 0.0: 90.0±0.1 %; skipinit no biases, dropout 0.0: "
      "diverges.",
    ),
    (None, None, None, None),
  ],
)
def test_l2_makes_skipinit_more_accurate(with_l2, without, holds, evidence):
  (finding,) = regularization(
    regularized("skipinit", with_l2, False, 0.0),
    regularized("skipinit", without, False, 0.0, l2=0.0),
  )
  assert finding.claim == "L2 makes SkipInit more accurate."
  assert finding.holds is holds
  if evidence is not None:
    assert finding.evidence == evidence


@pytest.mark.parametrize(
  ("use_bias", "dropout_rate", "claim"),
  [
    (True, 0.0, "Biases alone make SkipInit more accurate."),
    (False, 0.6, "Dropout alone makes SkipInit more accurate."),
  ],
)
@pytest.mark.parametrize(("accuracy", "holds"), [(0.92, True), (0.88, False)])
def test_biases_and_dropout_alone(use_bias, dropout_rate, claim, accuracy, holds):
  findings = regularization(
    regularized("skipinit", 0.9, False, 0.0),
    regularized("skipinit", accuracy, use_bias, dropout_rate),
  )
  assert verdicts(findings) == {claim: holds}


def test_regularization_of_other_methods_has_no_findings():
  assert regularization(regularized("batch_norm", 0.9, True, 0.6)) == []


def test_batch_norm_at_the_output_only():
  findings = depth(
    make_search("output_batch_norm", 0.9, row="MLP 9-8", depth=9),
    make_search("output_batch_norm", None, row="MLP 99-8", depth=99),
  )
  assert verdicts(findings) == {
    "Batch norm at the output only trains at every depth.": False
  }


def scaled(accuracy, alpha, learnable=False, deviation=0.001, method="batch_norm"):
  kind = "learnable" if learnable else "constant"
  return make_search(
    method,
    accuracy,
    deviation,
    row=f"MLP 9-8, {method}, {kind} α",
    column=f"α = {alpha}",
    alpha=alpha,
    learnable=learnable,
  )


def branch_scale(*searches):
  return branch_scale_findings(make_results("branch_scale_study", searches))


@pytest.mark.parametrize(
  ("accuracies", "holds", "as_accurate", "evidence"),
  [
    (
      (0.9, 0.901),
      True,
      True,
      "α = 0.5: 90.0±0.1 %; α = 1: 90.1±0.1 %",
    ),
    ((0.9, 0.92), True, False, "α = 0.5: 90.0±0.1 %; α = 1: 92.0±0.1 %"),
    ((0.9, None), False, None, "α = 0.5: 90.0±0.1 %; α = 1: diverges"),
    ((0.1, 0.9), False, None, "α = 0.5: 10.0±0.1 %, at chance; α = 1: 90.0±0.1 %"),
  ],
)
def test_does_alpha_matter(accuracies, holds, as_accurate, evidence):
  searches = map(scaled, accuracies, (0.5, 1))
  first, *others = branch_scale(*searches)
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
  findings = branch_scale(
    *map(functools.partial(scaled, learnable=True), learnable, alphas),
    *map(scaled, constant, alphas),
    # Another method's constants are not compared with.
    *(scaled(0.2, alpha, method="skipinit") for alpha in alphas),
  )
  finding = finding_of(findings, "MLP 9-8, batch_norm, learnable α: at least as")
  assert finding.holds is holds
  assert finding.evidence.startswith(evidence)


@pytest.mark.parametrize(("accuracy", "holds"), [(0.9, True), (0.1, False)])
def test_a_reference_trains_or_not(accuracy, holds):
  reference = make_search(
    "batch_norm_divide_by_sqrt2", accuracy, row="MLP 9-8, as it is", alpha=None
  )
  assert verdicts(branch_scale(reference)) == {
    "MLP 9-8: Batch norm, divide by √2 trains.": holds
  }
