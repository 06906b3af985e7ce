"""The batch-size study: accuracy, loss, best and largest stable rate by batch size."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
import optax

from skipinit_jax import methods
from skipinit_jax.analysis import sharpness
from skipinit_jax.data import in_memory
from skipinit_jax.document import Entry, Figure, Finding, Section, Table, drawing
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.files import as_type
from skipinit_jax.studies import checks, claims, figures, report, study
from skipinit_jax.studies.claims import Points
from skipinit_jax.studies.figures import Point
from skipinit_jax.studies.formatting import format_rate, format_rates
from skipinit_jax.studies.search import SearchConfig
from skipinit_jax.studies.statistics import Optimum
from skipinit_jax.training import TrainConfig, make_init, make_mesh, make_optimizer
from skipinit_jax.training.batches import make_batch_source

if TYPE_CHECKING:
  from matplotlib.figure import Figure as Drawing

BUDGETS: tuple[str, ...] = ("epochs", "steps")
_PREDICTION = (
  "a prediction, not a measurement: 2 (1 + momentum) / λ, with λ the largest "
  "eigenvalue of the Hessian of the first batch's loss at initialization."
)
# An epoch is whole batches, so that steps are the same only to the nearest epoch.
_STEPS_TOLERANCE = 0.05


@dataclasses.dataclass
class BatchSizeStudyConfig:
  """The batch-size figures of De & Smith (2020): batch sizes by methods.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`.
    batch_sizes: examples of a step.
    budgets: what is the same for all batch sizes: epochs, steps, or one after the
      other. The steps are those of `train.epochs` at `train.batch_size`, to the nearest
      whole epoch.
    ghost_batch_size: examples of a ghost batch of batch norm, for larger batches;
      None: normalize whole batches.
    train: the network and its training, at the batch size that `search` is for.
    search: the learning-rate search. Its rates are for `train.batch_size`: the search
      of another batch size begins at rates in proportion to it.
  """

  methods: tuple[str, ...] = ("batch_norm", "skipinit", "unnormalized")
  batch_sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
  budgets: tuple[str, ...] = BUDGETS
  ghost_batch_size: int | None = 64
  train: TrainConfig = dataclasses.field(default_factory=lambda: TrainConfig(width=4))
  search: SearchConfig = dataclasses.field(
    default_factory=lambda: SearchConfig(until_unstable=True)
  )


@dataclasses.dataclass(frozen=True)
class BatchSizeLabels:
  """What the searches of a batch-size study vary: see `BatchSizeStudyConfig`."""

  method: str
  batch_size: int
  budget: str


Result = study.SearchResult[BatchSizeLabels]
Results = study.StudyResults[BatchSizeLabels]


def batch_size_study(config: BatchSizeStudyConfig) -> study.Study[BatchSizeLabels]:
  """Returns the study of a configuration.

  Raises:
    UsageError: a list is empty or names a value twice, a field is set that the study
      sets itself, the data set is not there, or a batch size does not fit it or the
      number of steps.
  """
  checks.check_config(
    config,
    varied={
      "method": "methods",
      "ghost_batch_size": "ghost_batch_size",
      "learning_rate": "search.learning_rates",
    },
  )
  train = config.train
  train.validate()
  dataset = train.load_dataset()
  num_examples = dataset.train.num_examples
  searches = []
  for budget in config.budgets:
    if budget not in BUDGETS:
      raise unknown_name("budget", budget, BUDGETS)
    for batch_size in config.batch_sizes:
      if not 1 <= batch_size <= num_examples:
        raise UsageError(
          f"batch_sizes has {batch_size}: each must be from 1 to {num_examples}, the "
          "number of training examples."
        )
      run = dataclasses.replace(train, batch_size=batch_size)
      if budget == "steps":
        run = _with_steps_of(train, run, num_examples)
      factor = batch_size / train.batch_size
      protocol = dataclasses.replace(
        config.search,
        learning_rates=tuple(factor * rate for rate in config.search.learning_rates),
        min_learning_rate=factor * config.search.min_learning_rate,
        max_learning_rate=factor * config.search.max_learning_rate,
      )
      for name in config.methods:
        ghost = ghost_batch_size(config.ghost_batch_size, name, batch_size)
        searches.append(
          study.Search(
            name=f"same_{budget}/batch_{batch_size}/{name}",
            row=f"batch {batch_size}, same {budget}",
            column=methods.get(name).title,
            labels=BatchSizeLabels(name, batch_size, budget),
            config=dataclasses.replace(run, method=name, ghost_batch_size=ghost),
            protocol=protocol,
          )
        )
  return study.Study("batch_size_study", config, tuple(searches))


def ghost_batch_size(largest: int | None, method: str, batch_size: int) -> int | None:
  """Returns the ghost batch size of a run; None where whole batches are normalized."""
  if largest is None or batch_size <= largest:
    return None
  return largest if methods.get(method).has_batch_norm else None


def _with_steps_of(
  config: TrainConfig, run: TrainConfig, num_examples: int
) -> TrainConfig:
  """Returns a run with the steps and the schedule of another batch size's."""
  steps_per_epoch = in_memory.steps_per_epoch(num_examples, run.batch_size)
  of_config = in_memory.steps_per_epoch(num_examples, config.batch_size)
  factor = of_config / steps_per_epoch
  epochs = max(1, round(factor * config.epochs))
  steps, wanted = epochs * steps_per_epoch, config.epochs * of_config
  if abs(steps - wanted) > _STEPS_TOLERANCE * wanted:
    raise UsageError(
      f"batch_sizes has {run.batch_size}: its whole epochs come no closer than {steps} "
      f"steps to the {wanted} of {config.epochs} epochs at batch size "
      f"{config.batch_size}: raise train.epochs, or leave out it or the steps."
    )
  return dataclasses.replace(
    run,
    epochs=epochs,
    constant_epochs=factor * config.constant_epochs,
    halve_every_epochs=factor * config.halve_every_epochs,
    warmup_epochs=factor * config.warmup_epochs,
    growth_per_epoch=config.growth_per_epoch ** (1 / factor),
    eval_every_epochs=max(1, round(factor * config.eval_every_epochs)),
  )


def predict_rates(
  results: Results, on_search: Callable[[str], None] = lambda title: None
) -> Results:
  """Returns results with the largest rates that curvature at initialization allows.

  Gradient descent with momentum m is stable along a direction of curvature lambda as
  long as its rate is below 2 (1 + m) / lambda; with Nesterov's momentum the bound is
  2 (1 + m) / (lambda (1 + 2 m)). Here lambda is the largest eigenvalue of the Hessian
  of each run's first loss: that of its initial network on its first batch, without L2
  and label smoothing. It says nothing of the noise between batches, and curvature
  changes in training: at a rate above the bound the loss first grows, and may find a
  flatter region (Lewkowycz et al., 2020; Gilmer et al., ICLR 2022).

  Args:
    on_search: called with the title of each search before its curvature is measured.

  Raises:
    UsageError: the configuration is of another version, its data are not there, the
      optimizer is not sgd, or a method has other rates for some parameters.
  """
  try:
    config: BatchSizeStudyConfig = as_type(BatchSizeStudyConfig, results.config)
  except ValueError as error:
    raise UsageError(f"The study is of another version: {error}.") from None
  # Budgets differ in what follows the first step.
  rates: dict[tuple[str, int], list[float]] = {}
  predicted = {}
  for search in batch_size_study(config).searches:
    key = search.labels.method, search.labels.batch_size
    if key not in rates:
      on_search(search.title)
      seeds = range(search.protocol.num_seeds)
      rate = search.protocol.learning_rates[0]
      rates[key] = [_predicted_rate(search.run_config(rate, seed)) for seed in seeds]
    predicted[search.name] = rates[key]
  return dataclasses.replace(results, predicted_rates=predicted)


def _predicted_rate(config: TrainConfig) -> float:
  """Returns the largest rate that curvature allows at the first step of a run."""
  factors = config.make_method().rate_factors
  if config.optimizer != "sgd" or {*factors.values()} != {1.0}:
    raise UsageError(
      f"The optimizer is {config.optimizer}, with the factors {factors} on its rate: "
      "curvature bounds the rate of sgd, with one rate for all parameters."
    )
  dataset, mesh = config.load_dataset(), make_mesh()
  model = config.make_model(dataset.num_classes)
  init, _ = make_init(
    model,
    lambda rate: make_optimizer(config, 1, rate),
    dataset.image_shape,
    mesh=mesh,
  )
  state = init(np.uint32(config.seed), np.float32(config.learning_rate))
  source = make_batch_source(config, dataset, mesh)
  ((data, _),) = source.dispatches(0, 1)
  images, labels = source.batches(state, data)(state.step)
  source.close()

  def loss(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  variables = {"params": state.params, **state.model_state}
  # Rates are compared by factors of two.
  measured = sharpness(model, variables, images, loss, tolerance=0.03)
  momentum = config.momentum
  factor = (1 + momentum) / (1 + 2 * momentum * config.nesterov)
  return factor * measured.largest_rate


def batch_norm_gaps(results: Results) -> dict[int, Points]:
  """Returns by batch size how much more accurate batch norm is than SkipInit."""
  pairs = _pairs(_compared(results))
  return {size: claims.accuracy_gap(norm, skip) for size, norm, skip in pairs}


def _compared(results: Results) -> list[Result]:
  """Returns the searches at the same epochs; at the same steps, if there are none."""
  budgets = {search.labels.budget for search in results.searches}
  budget = "epochs" if "epochs" in budgets else "steps"
  return [each for each in results.searches if each.labels.budget == budget]


def batch_size_claims(results: Results) -> list[Finding]:
  """Checks the claims on batch size and learning rate (De & Smith, 2020)."""
  searches = _compared(results)
  found = [
    _is_linear(column, [search for search in searches if search.column == column])
    for column in study.unique(search.column for search in searches)
  ]
  pairs = _pairs(searches)
  if pairs:
    found += [_is_stable_at_larger_rates(pairs), _has_same_rate(*pairs[0])]
  if len(pairs) > 1:
    found.append(_pays_at_large_batches(batch_norm_gaps(results), pairs[-1]))
  if results.predicted_rates:
    found.append(_is_predicted(searches, results.predicted_rates))
  return found


def _is_linear(column: str, searches: Sequence[Result]) -> Finding:
  claim = (
    f"{column}: below a threshold, the optimal learning rate is proportional to the "
    "batch size."
  )
  # A best rate at the edge of what was tried is only a bound of the optimal one.
  points = sorted(
    (math.log2(each.labels.batch_size), *map(math.log2, _rates(each.optimum)))
    for each in searches
    if each.optimum is not None and each.optimum.is_inside and each.trains
  )
  # The threshold is not known beforehand: the smaller half of the batch sizes, but
  # three at least, because rates are only known to a factor of two.
  points = points[: max(3, -(-len(points) // 2))]
  if len(points) < 3:
    return Finding(
      claim,
      None,
      "Fewer than three batch sizes train with a best rate inside those tried.",
    )
  first, rate, lowest, highest = points[0]
  last, last_rate, last_lowest, last_highest = points[-1]
  slope, least, most = (
    growth / (last - first)
    for growth in (last_rate - rate, last_lowest - highest, last_highest - lowest)
  )
  evidence = (
    f"From batch size {2**first:.0f} to {2**last:.0f} the optimal rate goes from "
    f"{format_rate(2**rate)} to {format_rate(2**last_rate)}: it grows as the batch "
    f"size to the power {slope:.2f}"
    + (f" ({least:.2f} to {most:.2f} within its ranges)." if least < most else ".")
  )
  if 0.5 < slope < 1.5:
    return Finding(claim, True, evidence)
  return Finding(claim, None if least < 1.5 and most > 0.5 else False, evidence)


def _rates(optimum: Optimum) -> tuple[float, float, float]:
  return optimum.learning_rate, optimum.lowest_rate, optimum.highest_rate


def _pairs(searches: Sequence[Result]) -> list[tuple[int, Result, Result]]:
  """Returns batch norm and SkipInit by batch size, ascending, where both train."""
  trained = {
    (search.labels.batch_size, search.labels.method): search
    for search in searches
    if search.trains
  }
  return [
    (size, trained[size, "batch_norm"], trained[size, "skipinit"])
    for size in sorted({search.labels.batch_size for search in searches})
    if {(size, "batch_norm"), (size, "skipinit")} <= trained.keys()
  ]


def _is_stable_at_larger_rates(pairs: Sequence[tuple[int, Result, Result]]) -> Finding:
  evidence = "; ".join(
    f"batch {size}: {format_stable_rate(norm)} and {format_stable_rate(skip)}"
    for size, norm, skip in pairs
  )
  return Finding(
    "Batch norm is stable at larger learning rates than SkipInit.",
    claims.all_hold([_is_stabler(norm, skip) for _, norm, skip in pairs]),
    f"{evidence}.",
  )


def _is_stabler(search: Result, other: Result) -> bool | None:
  """Returns whether a search's largest stable rate is larger than another's."""
  rate, other_rate = search.largest_stable_rate, other.largest_stable_rate
  assert rate is not None and other_rate is not None
  if rate > other_rate:
    return None if other.is_stable_throughout else True
  return None if search.is_stable_throughout else False


def format_stable_rate(search: Result) -> str:
  """Returns the largest stable rate, as a bound where larger ones were not tried."""
  if search.largest_stable_rate is None:
    return "none"
  bound = "≥ " if search.is_stable_throughout else ""
  return bound + format_rate(search.largest_stable_rate)


def _has_same_rate(size: int, norm: Result, skip: Result) -> Finding:
  assert norm.optimum is not None and skip.optimum is not None
  rate, lowest, highest = _rates(norm.optimum)
  other_rate, other_lowest, other_highest = _rates(skip.optimum)
  # A best rate at the edge of what was tried is only a bound of the optimal one.
  is_known = norm.optimum.is_inside and skip.optimum.is_inside
  holds = None
  if is_known and 0.5 <= rate / other_rate <= 2:
    holds = True
  elif is_known and not (lowest <= 2 * other_highest and other_lowest <= 2 * highest):
    holds = False
  return Finding(
    "At the smallest batch size batch norm does not use its larger rates: its optimal "
    "rate is within a factor of two of SkipInit's.",
    holds,
    f"Batch {size}: {format_rate(rate)} and {format_rate(other_rate)}.",
  )


def _pays_at_large_batches(
  gaps: dict[int, Points], largest: tuple[int, Result, Result]
) -> Finding:
  _, norm, skip = largest
  assert norm.optimum is not None and skip.optimum is not None
  rate, other_rate = norm.optimum.learning_rate, skip.optimum.learning_rate
  (_, small), *_, (_, large) = gaps.items()
  since = None
  for size, gap in reversed(gaps.items()):
    if not gap.is_positive():
      break
    since = size
  ahead = (
    "At the largest batch size it is not ahead for certain."
    if since is None
    else f"It is ahead from batch size {since} on."
  )
  evidence = "; ".join(f"batch {size}: {gap}" for size, gap in gaps.items())
  evidence = f"By points of accuracy, {evidence}. {ahead}"
  holds = (large - small).is_positive()
  if holds and rate <= other_rate:
    # What pays is something else.
    holds = None
    evidence += (
      f" But its best rate at the largest is {format_rate(rate)}, and SkipInit's "
      f"{format_rate(other_rate)}."
    )
  return Finding(
    "Batch norm's larger rates pay at large batch sizes: its advantage over SkipInit "
    "is larger at the largest batch size than at the smallest.",
    holds,
    evidence,
  )


def _is_predicted(
  searches: Sequence[Result], predicted: Mapping[str, Sequence[float]]
) -> Finding:
  verdicts: list[bool | None] = []
  ratios: dict[str, list[str]] = {}
  for search in sorted(searches, key=lambda search: search.labels.batch_size):
    stable = search.largest_stable_rate
    if stable is None or search.name not in predicted:
      continue
    ratio = stable / statistics.geometric_mean(predicted[search.name])
    bound = "≥ " if search.is_stable_throughout else ""
    ratios.setdefault(search.column, []).append(
      f"{bound}{format_rate(_rounded(ratio))} at batch {search.labels.batch_size}"
    )
    # The next rate of the search is twice as large, and the first that fails.
    fits = 1 / 4 < ratio <= 2
    verdicts.append(None if bound and ratio <= 2 else fits)
  evidence = "; ".join(f"{name} {', '.join(each)}" for name, each in ratios.items())
  return Finding(
    "The curvature of the first batch's loss predicts the largest stable rate within a "
    "factor of two.",
    claims.all_hold(verdicts) if verdicts else None,
    f"Measured over predicted: {evidence}." if evidence else "No rate is stable.",
  )


def _rounded(rate: float) -> float:
  """Returns the nearest power of two."""
  return 2.0 ** round(math.log2(rate))


def batch_size_report(results: Results) -> study.StudyReport:
  """Returns the curves at each budget, and the table of rates."""
  dataset = report.dataset_title(results)
  sections = [
    Section(f"At the same number of {budget}", "", [_curves(results, budget)])
    for budget in study.unique(search.labels.budget for search in results.searches)
  ]
  sections.append(Section("Learning rates", "", [rates_table(results)]))
  return study.StudyReport(
    f"Batch-size study on {dataset}",
    f"{report.network_title(results)} on {dataset}: test accuracy, training loss, "
    "optimal and largest stable learning rate by batch size and method (De & Smith, "
    "2020; our reading of its protocol, whose figures are published without numbers).",
    sections=sections,
  )


def _curves(results: Results, budget: str) -> Figure:
  return Figure(
    name=f"batch_size_same_{budget}",
    title=f"The same number of {budget} at every batch size",
    figure=batch_size_curves(results, budget),
    description="Four panels by batch size and method: test accuracy, training loss, "
    "optimal learning rate, largest stable learning rate.",
    note="Whiskers are one standard deviation, and the range of a rate. Networks "
    "that do not train have no optimal rate. Hollow marks are bounds: the best, or a "
    "stable, rate is the lowest or highest that was tried."
    + (
      f" Dashed lines without marks: {_PREDICTION}" if results.predicted_rates else ""
    ),
  )


def batch_size_curves(results: Results, budget: str) -> "Drawing":
  """Draws accuracy, loss, best and largest stable rate by batch size."""
  figure, panels = drawing.new_panels(
    (
      "test accuracy (%)",
      "training loss",
      "optimal learning rate",
      "largest stable learning rate",
    ),
    "batch size",
  )
  accuracy, loss, best, stable = panels
  searches = sorted(
    (each for each in results.searches if each.labels.budget == budget),
    key=lambda search: search.labels.batch_size,
  )
  sizes = study.unique(search.labels.batch_size for search in searches)
  drawing.scale_by_decades(
    loss, np.array([each.train_loss for each in searches if each.train_loss])
  )
  styles = drawing.styles(each.column for each in results.searches)
  for column, style in styles.items():
    line = [
      (each.labels.batch_size, each) for each in searches if each.column == column
    ]
    if not line:
      continue
    figures.draw_line(accuracy, figures.mean_points(line), style, column)
    losses = figures.mean_points(line, "train_loss", 1.0)
    figures.draw_line(loss, losses, style)
    figures.draw_line(best, figures.best_rate_points(line), style)
    rates = [
      Point(size, each.largest_stable_rate, is_bound=each.is_stable_throughout)
      for size, each in line
      if each.largest_stable_rate is not None
    ]
    figures.draw_line(stable, rates, style)
    predicted = [
      (size, statistics.geometric_mean(results.predicted_rates[each.name]))
      for size, each in line
      if each.largest_stable_rate is not None and each.name in results.predicted_rates
    ]
    if predicted:
      stable.plot(*zip(*predicted, strict=True), "--", color=style["color"])
  for axes in panels:
    figures.log_axis(axes, "x", sizes, most=7, label=str)
  # Legends list error bars after lines, and this one is to be the last.
  accuracy.errorbar(
    [], [], fmt=":", color="gray", label="proportional to the batch size"
  )
  if results.predicted_rates:
    label = "predicted by curvature"
    accuracy.errorbar([], [], fmt="--", color="gray", label=label)
  for axes in (best, stable):
    if drawn := figures.log_rate_axis(axes, most=8):
      # A line of slope one through the middle: in proportion to the batch size.
      middle = math.sqrt(min(drawn) * max(drawn) / (sizes[0] * sizes[-1]))
      limits = axes.get_ylim()
      axes.plot(sizes, [middle * size for size in sizes], ":", color="gray")
      axes.set_ylim(limits)
  drawing.finish(figure)
  return figure


def rates_table(results: Results) -> Table:
  """Returns the optimal and the largest stable rate of each search."""
  rows: list[list[str | Entry]] = []
  for search in results.searches:
    optimal: list[str | Entry] = [Entry("does not train", "bad"), "none"]
    if search.optimum is not None and search.trains:
      rate, low, high = map(format_rate, _rates(search.optimum))
      optimal = [rate, f"{low} to {high}" if low != high else low]
    loss = "none" if search.train_loss is None else f"{search.train_loss:.4f}"
    stable = [format_stable_rate(search)]
    if by_seed := results.predicted_rates.get(search.name):
      rates = statistics.geometric_mean(by_seed), min(by_seed), max(by_seed)
      stable.append(format_rates(*map(_rounded, rates)))
    elif results.predicted_rates:
      stable.append("-")
    rows.append([search.row, search.column, *optimal, *stable, loss])
  predicted = ["predicted stable"] if results.predicted_rates else []
  return Table(
    name="rates",
    title="Optimal and largest stable learning rate",
    header=[
      *KIND.header,
      "optimal",
      "range",
      "largest stable",
      *predicted,
      "training loss",
    ],
    rows=rows,
    note="Stable: enough seeds completed, with a mean test accuracy above chance; ≥: "
    "no higher rate was tried. The training loss is the last epoch's mean, at the "
    "optimal rate."
    + (
      f" Predicted: {_PREDICTION} Mean and range over seeds, by powers of two."
      if predicted
      else ""
    ),
  )


KIND = study.StudyKind(
  "batch_size_study",
  BatchSizeLabels,
  ("batch size", "method"),
  batch_size_claims,
  batch_size_report,
  batch_size_study,
)
study.register(KIND)
