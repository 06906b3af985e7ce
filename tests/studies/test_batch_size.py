"""The batch-size study: its rates, steps, schedules, claims and report."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from experiments import stable_rates
from skipinit_jax import data
from skipinit_jax.data import augmentation
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import (
  BatchSizeStudyConfig,
  SearchConfig,
  batch_size_study,
  read_results,
)
from skipinit_jax.studies.batch_size import (
  BatchSizeLabels,
  batch_size_claims,
  batch_size_curves,
  format_stable_rate,
  predict_rates,
  rates_table,
)
from skipinit_jax.studies.results import keep_predictions, write_results
from skipinit_jax.training import TrainConfig
from skipinit_jax.training.optimizer import make_schedule
from tests.studies.results import ALL_RATES, make_result, make_results, run_study

# What `digits` has: 92 batches of 16.
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


def searches_of(**changes):
  return batch_size_study(dataclasses.replace(CONFIG, **changes)).searches


def test_every_batch_size_with_every_method_at_each_budget():
  study = batch_size_study(CONFIG)
  assert [search.name for search in study.searches] == [
    f"same_{budget}/batch_{size}/{method}"
    for budget in ("epochs", "steps")
    for size in (8, 16, 64, 256)
    for method in ("batch_norm", "skipinit")
  ]
  for search in study.searches:
    labels, config = search.labels, search.config
    assert (config.batch_size, config.method) == (labels.batch_size, labels.method)
    # Rates and their bounds are in proportion to the batch size.
    factor, protocol = labels.batch_size / 16, search.protocol
    assert protocol.learning_rates == (0.25 * factor, 0.5 * factor)
    bounds = (protocol.min_learning_rate, protocol.max_learning_rate)
    assert bounds == (0.125 * factor, 4 * factor)
    if labels.budget == "epochs":
      assert CONFIG.train == dataclasses.replace(
        config, batch_size=16, method="skipinit", ghost_batch_size=None
      )


@pytest.mark.parametrize(
  "schedule",
  [
    {"schedule": "halving", "constant_epochs": 4, "halve_every_epochs": 2},
    {"schedule": "constant"},
    {"schedule": "cosine"},
    {"schedule": "exponential", "growth_per_epoch": 1.5},
  ],
)
def test_same_steps_have_the_same_rate_at_every_step(schedule):
  train = TrainConfig(
    batch_size=16, epochs=8, warmup_epochs=2, eval_every_epochs=2, **schedule
  )
  steps = np.arange(0, 8 * 92, 23)
  expected = [float(make_schedule(train, 92)(step)) for step in steps]
  assert max(expected) > 0.9
  assert min(expected) < 0.5 or schedule["schedule"] in ("constant", "exponential")
  sizes = (4, 8, 16, 32, 64, 128, 256, 736)
  for search in searches_of(
    methods=("skipinit",), batch_sizes=sizes, budgets=("steps",), train=train
  ):
    config = search.config
    # Batches of 256 are 5 an epoch, not 92 / 16: the rest of the data is left out.
    per_epoch = NUM_EXAMPLES // config.batch_size
    assert abs(config.epochs * per_epoch - 8 * 92) <= per_epoch / 2
    # Evaluations are as many, but no more than one an epoch.
    num_evaluations = config.epochs / config.eval_every_epochs
    assert num_evaluations == pytest.approx(min(4, config.epochs), rel=0.05)
    # Cosine decays over all steps, of which batches of 128 and 256 have other numbers.
    is_near = schedule["schedule"] == "cosine" and config.batch_size in (128, 256)
    actual = [float(make_schedule(config, per_epoch)(step)) for step in steps]
    np.testing.assert_allclose(
      actual, expected, rtol=1e-5, atol=0.01 if is_near else 1e-5
    )


def test_only_larger_batches_of_batch_norm_have_ghost_batches():
  names = ("batch_norm", "skipinit", "output_batch_norm", "unnormalized")
  for search in searches_of(methods=names):
    normalized = search.labels.method in ("batch_norm", "output_batch_norm")
    larger = search.labels.batch_size in (64, 256)
    assert search.config.ghost_batch_size == (16 if normalized and larger else None)
  whole = searches_of(ghost_batch_size=None)
  assert {search.config.ghost_batch_size for search in whole} == {None}


SIZES = (16, 32, 64, 128, 256, 512, 1024)


def at_size(method, size, accuracy=0.9, deviation=0.001, *, budget="epochs", **fields):
  labels = BatchSizeLabels(method, size, budget)
  row = f"batch {size}, same {budget}"
  return make_result(labels, accuracy, deviation, row=row, column=method, **fields)


def findings_on(*searches):
  return batch_size_claims(make_results("batch_size_study", searches))


@pytest.mark.parametrize(
  ("exponents", "sizes", "fields", "holds", "evidence"),
  [
    # Proportional up to a threshold, then constant.
    ((-6, -5, -4, -3, -3, -3, -3), SIZES, {}, True, "power 1.00."),
    # 3 sizes at least decide, although 3 of 4 are more than half.
    ((-6, -5, -4, -4), SIZES[:4], {}, True, "power 1.00."),
    # The order of the searches means nothing.
    ((-3, -4, -5, -6), SIZES[3::-1], {}, True, "power 1.00."),
    ((-4, -4, -4, -4, -3, -2, -1), SIZES, {}, False, ""),
    ((-8, -6, -4, -2, -2, -2, -2), SIZES, {}, False, "power 2.00."),
    # 2⁻⁴ throughout, but within a deviation also half and twice of it: over three
    # doublings of the batch size the power is from -2/3 to 2/3.
    ((-4,) * 7, SIZES, {"within": (2**-5, 2**-3)}, None, "0.00 (-0.67 to 0.67 within"),
    # At chance, or with a best rate at the edge of what was tried. A grid of one rate
    # in proportion to the batch size would otherwise prove proportionality.
    ((-4,) * 3, SIZES[:3], {"trains": False}, None, "Fewer than three"),
    ((-4,) * 3, SIZES[:3], {"tried": (2**-4, 2**-3)}, None, "Fewer than three"),
  ],
)
def test_optimal_rate_in_proportion_to_the_batch_size(
  exponents, sizes, fields, holds, evidence
):
  (finding,) = findings_on(
    *(
      at_size("skipinit", size, rate=2.0**exponent, **fields)
      for size, exponent in zip(sizes, exponents, strict=True)
    )
  )
  assert finding.holds is holds
  assert evidence in finding.evidence


def pair(size, norm, skip, **fields):
  """Batch norm and SkipInit at one batch size, each with its own fields."""
  return [
    at_size("batch_norm", size, **{**fields, **norm}),
    at_size("skipinit", size, **{**fields, **skip}),
  ]


def finding_of(findings, words):
  (finding,) = (finding for finding in findings if words in finding.claim)
  return finding


@pytest.mark.parametrize(
  ("stable", "highest", "holds"),
  [
    # The exponents of the largest stable rates of batch norm and SkipInit at both batch
    # sizes, and of the highest rates that were tried.
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
  norm, skip = (
    {"tried": ALL_RATES[: ALL_RATES.index(2.0**each) + 1]} for each in highest
  )
  findings = findings_on(
    *pair(16, norm | {"stable": 2.0 ** stable[0]}, skip | {"stable": 2.0 ** stable[1]}),
    *pair(32, norm | {"stable": 2.0 ** stable[2]}, skip | {"stable": 2.0 ** stable[3]}),
  )
  assert finding_of(findings, "stable at larger learning rates").holds is holds


def test_stable_rate_of_which_only_a_bound_is_known():
  searches = [
    at_size("skipinit", 16, stable=2**-2),
    at_size("skipinit", 16, stable=2**-2, tried=(2**-4, 2**-2)),
    at_size("skipinit", 16, 0.1),
  ]
  assert [format_stable_rate(each) for each in searches] == ["2⁻²", "≥ 2⁻²", "none"]


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
  # At larger batch sizes, and at the same steps, they may differ.
  others = pair(64, {"rate": 1.0}, {"rate": 2**-4})
  steps = pair(16, {"rate": 1.0}, {"rate": 2**-4}, budget="steps")
  findings = findings_on(*others, *steps, *pair(16, norm, skip))
  finding = finding_of(findings, "At the smallest batch size")
  assert finding.holds is holds
  assert finding.evidence.startswith("Batch 16: 2")
  assert finding_of(findings_on(*steps), "At the smallest").holds is False


@pytest.mark.parametrize(
  ("small", "large", "deviation", "rate", "holds"),
  [
    # Accuracies of batch norm and SkipInit.
    ((0.95, 0.94), (0.93, 0.85), 0.001, 2**-3, True),
    ((0.95, 0.90), (0.93, 0.92), 0.001, 2**-3, False),
    # The gap grows from 0 to 1, its deviation is 2 root 4, that is 2, or unknown.
    ((0.95, 0.95), (0.95, 0.94), 0.01, 2**-3, None),
    ((0.95, 0.94), (0.93, 0.85), None, 2**-3, None),
    # Batch norm is ahead at SkipInit's own rate.
    ((0.95, 0.94), (0.93, 0.85), 0.001, 2**-4, None),
  ],
)
def test_large_rates_pay_at_large_batches(small, large, deviation, rate, holds):
  norm = {"accuracy": large[0], "rate": rate}
  findings = findings_on(
    *pair(16, {"accuracy": small[0]}, {"accuracy": small[1]}, deviation=deviation),
    *pair(256, norm, {"accuracy": large[1]}, deviation=deviation),
  )
  finding = finding_of(findings, "pay at large batch sizes")
  assert finding.holds is holds
  if holds:
    assert "batch 16: +1.0±0.1; batch 256: +8.0±0.1." in finding.evidence
    assert finding.evidence.endswith("It is ahead from batch size 16 on.")


def test_batch_norm_is_ahead_from_the_size_on_where_it_stays_ahead():
  gaps = {16: 0.03, 32: -0.01, 64: 0.02, 128: 0.04}
  searches = [
    each
    for size, gap in gaps.items()
    for each in pair(size, {"accuracy": 0.9 + gap, "rate": 2**-3}, {"accuracy": 0.9})
  ]
  finding = finding_of(findings_on(*searches), "pay at large batch sizes")
  assert finding.evidence.endswith("It is ahead from batch size 64 on.")
  last = pair(256, {"accuracy": 0.9}, {"accuracy": 0.9})
  finding = finding_of(findings_on(*searches, *last), "pay at large batch sizes")
  assert finding.evidence.endswith("it is not ahead for certain.")


def test_what_needs_both_methods_is_left_out_without_one():
  assert len(findings_on(*(at_size("skipinit", size) for size in SIZES))) == 1
  # Nor do networks at chance count.
  findings = findings_on(*pair(16, {}, {"accuracy": 0.1}))
  assert [finding.holds for finding in findings] == [None, None]


PREDICTED = BatchSizeStudyConfig(
  methods=("skipinit_one",),
  batch_sizes=(NUM_EXAMPLES,),
  budgets=("epochs",),
  train=TrainConfig(
    model="residual_mlp", depth=1, width=3, batch_size=NUM_EXAMPLES, dropout_rate=0.0
  ),
  search=SearchConfig((2**-4, 2**-3), extend=False, num_seeds=1, best_of=1),
)


def results_of(**train):
  config = dataclasses.replace(
    PREDICTED, train=dataclasses.replace(PREDICTED.train, **train)
  )
  return run_study(batch_size_study(config), lambda labels, rate, seed: 0.9)


def test_curvature_predicts_where_the_first_steps_diverge():
  # The same curvature, by the dense Hessian of the whole training set in order.
  dataset = data.load("digits")
  labels = dataset.train.labels
  images = augmentation.normalize(dataset.train.images, dataset.mean, dataset.std)
  model = dataclasses.replace(PREDICTED.train, method="skipinit_one").make_model(10)
  key, _ = jax.random.split(jax.random.key(0))
  variables = model.init(key, images[:1], train=False)
  params, unravel = ravel_pytree(variables["params"])

  @jax.jit
  @jax.hessian
  def hessian(params):
    logits = model.apply({"params": unravel(params)}, images, train=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  curvature = float(np.linalg.eigvalsh(hessian(params))[-1])

  # On a parabola of that curvature, sgd diverges just above the predicted rate.
  def last(rate, nesterov):
    sgd = optax.sgd(rate, momentum=0.9, nesterov=nesterov)

    def step(carry, _):
      updates, state = sgd.update(curvature * carry[0], carry[1])
      return (carry[0] + updates, state), None

    (x, _), _ = jax.lax.scan(step, (1.0, sgd.init(1.0)), length=100)
    return abs(float(x))

  for nesterov in (False, True):
    results = predict_rates(results_of(nesterov=nesterov))
    ((rate,),) = results.predicted_rates.values()
    assert last(0.95 * rate, nesterov) < 0.1 < 10 < last(1.05 * rate, nesterov)


def test_predicted_rates_stand_beside_the_measured_ones(tmp_path):
  write_results(results_of(), tmp_path)
  stable_rates.main(str(tmp_path))
  results = read_results(tmp_path)
  ((rate,),) = results.predicted_rates.values()
  assert rate > 0
  page = (tmp_path / "report.html").read_text()
  assert "Measured over predicted: SkipInit, α = 1 ≥ 2" in page
  assert "a prediction, not a measurement" in (tmp_path / "rates.md").read_text()
  for fields in ({"optimizer": "adamw"}, {"scale_rate_factor": 0.5}):
    with pytest.raises(UsageError, match="curvature bounds the rate of sgd"):
      predict_rates(results_of(**fields))


def test_a_study_that_goes_on_keeps_its_predictions(tmp_path):
  before = results_of()
  predicted = {before.searches[0].name: [2**-4]}
  write_results(dataclasses.replace(before, predicted_rates=predicted), tmp_path)
  config = dataclasses.replace(PREDICTED, batch_sizes=(64, NUM_EXAMPLES))
  grown = run_study(batch_size_study(config), lambda labels, rate, seed: 0.9)
  grown = keep_predictions(grown, tmp_path)
  assert grown.predicted_rates == predicted
  assert [row[5] for row in rates_table(grown).rows] == ["-", "2⁻⁴"]
  assert "batch 64" not in batch_size_claims(grown)[-1].evidence
  assert batch_size_curves(grown, "epochs")
  # A network of another width has another curvature.
  assert not keep_predictions(results_of(width=4), tmp_path).predicted_rates
  config = dataclasses.replace(PREDICTED, ghost_batch_size=32)
  ghosts = run_study(batch_size_study(config), lambda labels, rate, seed: 0.9)
  assert not keep_predictions(ghosts, tmp_path).predicted_rates


@pytest.mark.parametrize(
  ("predicted", "fields", "holds"),
  [
    # The measured one is 1/16, and the next rate fails.
    (2**-4, {}, True),
    (0.99 * 2**-2, {}, True),
    (2**-2, {}, False),
    (2**-5, {}, True),
    (0.99 * 2**-5, {}, False),
    (2**-2, {"tried": (2**-5, 2**-4)}, None),
    (2**-9, {"tried": (2**-5, 2**-4)}, False),
    (2**-4, {"trains": False}, None),
  ],
)
def test_prediction_fits_within_a_factor_of_two(predicted, fields, holds):
  search = at_size("skipinit", 16, **fields)
  results = dataclasses.replace(
    make_results("batch_size_study", [search]),
    predicted_rates={search.name: [predicted]},
  )
  assert finding_of(batch_size_claims(results), "curvature").holds is holds
