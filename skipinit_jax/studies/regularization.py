"""The regularization study: biases, dropout and L2, by method."""

import dataclasses
import itertools
from typing import TYPE_CHECKING

from skipinit_jax import methods
from skipinit_jax.document import Entry, Figure, Finding, Section, Table, drawing
from skipinit_jax.studies import checks, claims, figures, report, study
from skipinit_jax.studies.claims import Points
from skipinit_jax.studies.search import SearchConfig
from skipinit_jax.training import TrainConfig

if TYPE_CHECKING:
  from matplotlib.figure import Figure as Drawing


@dataclasses.dataclass
class RegularizationStudyConfig:
  """Every combination of biases and dropout, by method, and some without L2.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`.
    methods_without_l2: names of methods to train also without L2.
    use_bias: whether convolutions and dense layers have biases.
    dropout_rates: shares of features dropped before the classifier.
    train: the network and its training.
    search: the learning-rate search.
  """

  methods: tuple[str, ...] = ("batch_norm", "skipinit")
  methods_without_l2: tuple[str, ...] = ("skipinit",)
  use_bias: tuple[bool, ...] = (False, True)
  dropout_rates: tuple[float, ...] = (0.0, 0.2, 0.6)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  search: SearchConfig = dataclasses.field(default_factory=SearchConfig)


@dataclasses.dataclass(frozen=True)
class RegularizationLabels:
  """What the searches of a regularization study vary: see `TrainConfig`."""

  method: str
  use_bias: bool
  dropout_rate: float
  l2: float


Result = study.SearchResult[RegularizationLabels]
Results = study.StudyResults[RegularizationLabels]


def regularization_study(
  config: RegularizationStudyConfig,
) -> study.Study[RegularizationLabels]:
  """Returns the study of a configuration.

  Raises:
    UsageError: a list is empty or names a value twice, or a field is set that the
      study sets itself.
  """
  checks.check_config(
    config,
    varied={
      "method": "methods",
      "use_bias": "use_bias",
      "dropout_rate": "dropout_rates",
      "learning_rate": "search.learning_rates",
    },
    optional=("methods", "methods_without_l2"),
  )
  rows = checks.with_and_without_l2(
    config.methods, config.methods_without_l2, train=config.train
  )
  searches = []
  for (name, with_l2), use_bias, rate in itertools.product(
    rows, config.use_bias, map(float, config.dropout_rates)
  ):
    labels = RegularizationLabels(
      name, use_bias, rate, config.train.l2 if with_l2 else 0.0
    )
    searches.append(
      study.Search(
        name=f"{name}{'' if with_l2 else '_without_l2'}/"
        f"{'biases' if use_bias else 'no_biases'}/dropout_{rate!r}",
        row=f"{methods.get(name).title}, {'biases' if use_bias else 'no biases'}"
        + ("" if with_l2 else ", no L2"),
        column=f"dropout {rate:g}" if rate else "no dropout",
        labels=labels,
        config=dataclasses.replace(config.train, **dataclasses.asdict(labels)),
        protocol=config.search,
      )
    )
  return study.Study("regularization_study", config, tuple(searches))


def regularization_claims(results: Results) -> list[Finding]:
  """Checks the claims on regularization (De & Smith, 2020), and its reviews' question.

  The paper adds biases and dropout together; a reviewer asks what each does alone.
  """
  plain = _best_skipinit(results)
  biases = _best_skipinit(results, use_bias=True)
  dropout = _best_skipinit(results, dropout=True)
  both = _best_skipinit(results, use_bias=True, dropout=True)
  without_l2 = _best_skipinit(results, with_l2=False)
  return [
    _is_better(claim, search, other)
    for claim, search, other in (
      ("Biases and dropout together make SkipInit more accurate.", both, plain),
      ("Biases alone make SkipInit more accurate.", biases, plain),
      ("Dropout alone makes SkipInit more accurate.", dropout, plain),
      ("L2 makes SkipInit more accurate.", plain, without_l2),
    )
    if search and other
  ]


def gain_of_both(results: Results) -> Points | None:
  """Returns what SkipInit gains from biases and dropout together, if both trained."""
  plain = _best_skipinit(results)
  both = _best_skipinit(results, use_bias=True, dropout=True)
  if not (plain and both) or None in (plain.test_accuracy, both.test_accuracy):
    return None
  return claims.accuracy_gap(both, plain)


def _best_skipinit(
  results: Results,
  *,
  use_bias: bool = False,
  dropout: bool = False,
  with_l2: bool = True,
) -> Result | None:
  """Returns SkipInit's most accurate search of this kind."""
  found = [
    search
    for search in results.searches
    if search.labels.method == "skipinit"
    and search.labels.use_bias == use_bias
    and (search.labels.dropout_rate > 0) == dropout
    and (search.labels.l2 > 0) == with_l2
  ]
  return max(found, key=lambda search: search.test_accuracy or 0.0, default=None)


def _is_better(claim: str, search: Result, other: Result) -> Finding:
  evidence = "; ".join(
    f"{each.row}, {each.column}: {claims.describe_accuracy(each)}"
    for each in (search, other)
  )
  completed = [each.test_accuracy is not None for each in (search, other)]
  if not all(completed):
    holds = completed[0] if any(completed) else None
    return Finding(claim, holds, f"{evidence}.")
  gap = claims.accuracy_gap(search, other)
  return Finding(claim, gap.is_positive(), f"{evidence}; difference {gap} points.")


def regularization_report(results: Results) -> study.StudyReport:
  """Returns the curves by dropout rate."""
  dataset = report.dataset_title(results)
  curves = Figure(
    name="accuracy_by_dropout",
    title="Test accuracy by dropout rate",
    figure=regularization_curves(results),
    description="Lines of the test accuracy by dropout rate, one for each method with "
    "and without biases and L2.",
    note="Whiskers are one standard deviation.",
  )
  return study.StudyReport(
    f"Regularization study on {dataset}",
    f"{report.network_title(results)} on {dataset}: test accuracy by biases, dropout, "
    "L2 and method. The paper regularizes SkipInit with biases and dropout together.",
    [curves],
    sections=[Section("What each buys", "", [gains_table(results)])],
  )


def gains_table(results: Results) -> Table:
  """Returns what biases, dropout and L2 add to the accuracy of each method."""
  cells = {
    search.labels: search
    for search in results.searches
    if search.test_accuracy is not None
  }
  rows: list[list[str | Entry]] = []
  for labels, search in cells.items():
    others = (
      dataclasses.replace(labels, use_bias=False),
      dataclasses.replace(labels, dropout_rate=0.0),
      dataclasses.replace(labels, l2=0.0),
      RegularizationLabels(labels.method, False, 0.0, 0.0),
    )
    added = [
      str(claims.accuracy_gap(search, cells[other]))
      if other != labels and other in cells
      else ""
      for other in others
    ]
    rows.append([search.row, search.column, *added])
  return Table(
    name="gains",
    title="Points of test accuracy that each adds to the others",
    header=["method", "dropout", "by biases", "by dropout", "by L2", "by all"],
    rows=rows,
    note="The accuracy less that of the same network without the one, or without all "
    "three; ± the root of the sum of both squared deviations.",
  )


def regularization_curves(results: Results) -> "Drawing":
  """Draws test accuracy by dropout rate, a line for each row of the table."""
  figure, (axes,) = drawing.new_panels([""], "dropout rate", "test accuracy (%)")
  for row, style in drawing.styles(results.rows).items():
    points = [(each.labels.dropout_rate, each) for each in results.in_row(row)]
    figures.draw_line(axes, sorted(figures.mean_points(points)), style, row)
  drawing.finish(figure)
  return figure


study.register(
  study.StudyKind(
    "regularization_study",
    RegularizationLabels,
    ("method", "dropout"),
    regularization_claims,
    regularization_report,
    regularization_study,
  )
)
