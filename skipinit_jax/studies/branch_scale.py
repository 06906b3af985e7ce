"""The branch-scale study: accuracy by the scalar at the end of each branch."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from skipinit_jax import methods
from skipinit_jax.document import Figure, Finding, drawing
from skipinit_jax.studies import checks, claims, figures, report, study
from skipinit_jax.studies.formatting import format_alpha
from skipinit_jax.studies.search import SearchConfig
from skipinit_jax.training import TrainConfig

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure as Drawing

# With its alpha replaced, each of these is the same method.
_TITLES = dict.fromkeys(
  ("skipinit", "skipinit_inverse_sqrt_depth", "skipinit_one"), "SkipInit"
)


@dataclasses.dataclass
class BranchScaleStudyConfig:
  """Every alpha on the branches of every method, learnable or constant, by depth.

  It answers what the reviews of De & Smith (2020) ask: what small constants do on the
  branches of a batch-normalized network, and whether alpha has to be learnable.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`, whose branches get the alphas.
    alphas: initial values of the scalar at the end of each branch.
    learnable: whether the scalar is a parameter (True) or a constant (False).
    references: names of methods to train as they are.
    depths: layers; blocks of a residual_mlp.
    train: the network and its training.
    search: the learning-rate search.
  """

  methods: tuple[str, ...] = ("batch_norm",)
  alphas: tuple[float, ...] = (1.0, 2**-0.5, 2**-2, 2**-4, 2**-6, 2**-8, 2**-10)
  learnable: tuple[bool, ...] = (False,)
  references: tuple[str, ...] = ("batch_norm", "batch_norm_divide_by_sqrt2")
  depths: tuple[int, ...] = (100, 1000)
  train: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(model="residual_mlp", width=64)
  )
  search: SearchConfig = dataclasses.field(default_factory=SearchConfig)


@dataclasses.dataclass(frozen=True)
class BranchScaleLabels:
  """What the searches of a branch-scale study vary.

  Attributes:
    depth: layers; blocks of a residual_mlp.
    method: the method's name.
    alpha: the initial value of the scalar; None: the method is trained as it is.
    learnable: whether the scalar is a parameter; None where alpha is None.
  """

  depth: int
  method: str
  alpha: float | None
  learnable: bool | None


Result = study.SearchResult[BranchScaleLabels]
Results = study.StudyResults[BranchScaleLabels]


def branch_scale_study(
  config: BranchScaleStudyConfig,
) -> study.Study[BranchScaleLabels]:
  """Returns the study of a configuration.

  Raises:
    UsageError: a list is empty or names a value twice, or a field is set that the
      study sets itself.
  """
  checks.check_config(
    config,
    varied={
      "method": "methods",
      "alpha": "alphas",
      "learnable_alpha": "learnable",
      "learning_rate": "search.learning_rates",
    },
    optional=("references",),
  )
  searches = []
  for depth in config.depths:
    labels = [
      BranchScaleLabels(depth, method, alpha, learnable)
      for method in config.methods
      for learnable in config.learnable
      for alpha in map(float, config.alphas)
    ]
    labels += [
      BranchScaleLabels(depth, method, None, None) for method in config.references
    ]
    searches += [_search(config, each) for each in labels]
  return study.Study("branch_scale_study", config, tuple(searches))


def _search(
  config: BranchScaleStudyConfig, labels: BranchScaleLabels
) -> study.Search[BranchScaleLabels]:
  train = dataclasses.replace(
    config.train,
    depth=labels.depth,
    method=labels.method,
    alpha=labels.alpha,
    learnable_alpha=labels.learnable,
  )
  if labels.alpha is None:
    name, row, column = "as_it_is", "as it is", _line_title(labels)
  else:
    kind = "learnable" if labels.learnable else "constant"
    name, row = f"{kind}/alpha_{labels.alpha!r}", _line_title(labels)
    column = f"α = {format_alpha(labels.alpha)}"
  return study.Search(
    name=f"{train.model}_{labels.depth}/{labels.method}/{name}",
    row=f"{train.network_title}, {row}",
    column=column,
    labels=labels,
    config=train,
    protocol=config.search,
  )


def _line_title(labels: BranchScaleLabels) -> str:
  """Returns a search's method for people, with the kind of its alpha."""
  name = labels.method
  # Results may name a method that only the program which made them knows.
  title = methods.get(name).title if name in methods.NAMES else name
  if labels.alpha is None:
    return title
  kind = "learnable" if labels.learnable else "constant"
  return f"{_TITLES.get(name, title)}, {kind} α"


def branch_scale_claims(results: Results) -> list[Finding]:
  """Answers what the reviews of De & Smith (2020) ask about alpha."""
  references = [each for each in results.searches if each.labels.alpha is None]
  found = [
    claims.trains_claim(
      f"{report.network_title(results, depth=search.labels.depth)}: "
      f"{search.column} trains.",
      [search],
    )
    for search in references
  ]
  rows = [results.in_row(row) for row in results.rows]
  scaled = [row for row in rows if row[0].labels.alpha is not None]
  for row in scaled:
    found += _any_alpha(row)
  for row in scaled:
    if row[0].labels.learnable:
      found += _learnable_is_as_good(row, results.searches)
  return found


def _any_alpha(searches: Sequence[Result]) -> list[Finding]:
  """Checks that the accuracy of a row does not depend on alpha."""
  row = searches[0].row
  found = [
    claims.trains_claim(
      f"{row}: every α trains.", searches, name=lambda search: search.column
    )
  ]
  trained = [search for search in searches if search.trains]
  if len(trained) > 1:
    best = max(trained, key=lambda search: search.test_accuracy or 0.0)
    worst = min(trained, key=lambda search: search.test_accuracy or 0.0)
    gap = claims.accuracy_gap(best, worst)
    found.append(
      Finding(
        f"{row}: every α that trains is as accurate.",
        # Seven equal accuracies have a range of three such errors once in 20 times.
        None if gap.error is None else gap.value <= 3 * gap.error,
        f"{best.column} and {worst.column} differ by {gap} points.",
      )
    )
  return found


def _learnable_is_as_good(
  searches: Sequence[Result], others: Sequence[Result]
) -> list[Finding]:
  """Compares a row of learnable alphas with that of the same constants."""
  verdicts: list[bool | None] = []
  evidence = []
  by_labels = {search.labels: search for search in others}
  for search in searches:
    constant = by_labels.get(dataclasses.replace(search.labels, learnable=False))
    if constant is None or not (search.trains or constant.trains):
      continue
    if search.trains != constant.trains:
      verdicts.append(search.trains)
      trained = "learnable" if search.trains else "constant"
      evidence.append(f"{search.column}: only the {trained} one trains")
    else:
      gap = claims.accuracy_gap(search, constant)
      verdicts.append(None if gap.error is None else gap.value >= -2 * gap.error)
      evidence.append(f"{search.column}: {gap} points")
  if not verdicts:
    return []
  claim = f"{searches[0].row}: at least as accurate as the same constant."
  return [Finding(claim, claims.all_hold(verdicts), "; ".join(evidence) + ".")]


def branch_scale_report(results: Results) -> study.StudyReport:
  """Returns the curves by alpha."""
  dataset = report.dataset_title(results)
  curves = Figure(
    name="accuracy_by_alpha",
    title="Test accuracy and optimal learning rate by α",
    figure=branch_scale_curves(results),
    description="Two panels for each depth, by α and method: test accuracy and optimal "
    "learning rate.",
    note="Whiskers are one standard deviation, and the range of a rate; hollow marks "
    "are rates at the edge of those allowed. Crosses on the lower edge mark an α at "
    "which too few runs complete; a method as it is that diverges has no line.",
  )
  train = TrainConfig(model=results.config["train"]["model"])
  return study.StudyReport(
    f"Branch-scale study on {dataset}",
    f"{train.model_title}s on {dataset} whose branches end in a factor α, a constant "
    "or a learnable scalar: which values train, and how well. Reviewers of De & Smith "
    "(2020) asked.",
    [curves],
  )


def branch_scale_curves(results: Results) -> "Drawing":
  """Draws test accuracy and best rate by alpha, a row of panels for each depth."""
  depths = study.unique(search.labels.depth for search in results.searches)
  given = {each.labels.alpha for each in results.searches}
  alphas = sorted(alpha for alpha in given if alpha is not None)
  lines = study.unique(_line_title(search.labels) for search in results.searches)
  titles = [
    f"{quantity}, depth {depth}"
    for depth in depths
    for quantity in ("test accuracy (%)", "optimal learning rate")
  ]
  figure, panels = drawing.new_panels(titles, "α at initialization")
  for accuracy, best, depth in zip(panels[::2], panels[1::2], depths, strict=True):
    searches = [each for each in results.searches if each.labels.depth == depth]
    for line, style in drawing.styles(lines).items():
      mine = [each for each in searches if _line_title(each.labels) == line]
      places = sorted(
        (
          (alphas.index(each.labels.alpha), each)
          for each in mine
          if each.labels.alpha is not None
        ),
        key=lambda place: place[0],
      )
      if not places:
        for search in mine:
          _draw_reference(accuracy, best, search, style["color"])
        continue
      figures.draw_line(accuracy, figures.mean_points(places), style, line)
      failed = [place for place, search in places if search.test_accuracy is None]
      accuracy.plot(failed, [3] * len(failed), "x", color=style["color"], markersize=6)
      figures.draw_line(best, figures.best_rate_points(places), style)
    accuracy.set_ylim(0, 104)
    figures.log_rate_axis(best, most=6)
    for axes in (accuracy, best):
      ticks = [format_alpha(alpha) for alpha in alphas]
      # Seven would touch each other.
      every = -(-len(alphas) // 6)
      axes.set_xticks(range(len(alphas))[::every], ticks[::every], fontsize=9)
      axes.set_xlim(-0.5, len(alphas) - 0.5)
  drawing.finish(figure)
  return figure


def _draw_reference(accuracy: "Axes", best: "Axes", search: Result, color: str) -> None:
  """Draws a method that has no alpha as a level line."""
  style: dict[str, Any] = {"color": color, "linestyle": "--", "linewidth": 1.5}
  if search.test_accuracy is None:
    accuracy.plot([], [], label=search.column, **style)
  else:
    accuracy.axhline(100 * search.test_accuracy, label=search.column, **style)
  if search.trains and search.optimum is not None:
    best.axhline(search.optimum.learning_rate, **style)


study.register(
  study.StudyKind(
    "branch_scale_study",
    BranchScaleLabels,
    ("network", "α or method"),
    branch_scale_claims,
    branch_scale_report,
    branch_scale_study,
  )
)
