"""The depth study: test accuracy and best rate by depth and method."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from skipinit_jax import data, methods
from skipinit_jax.document import Entry, Figure, Finding, Section, Table
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import checks, claims, figures, report, study
from skipinit_jax.studies.claims import Points
from skipinit_jax.studies.formatting import format_rates
from skipinit_jax.studies.search import SearchConfig
from skipinit_jax.training import TrainConfig

# The published table's largest distance between batch norm and SkipInit, alpha = 0,
# in percentage points: it is at a depth of 100.
_PUBLISHED_GAP = 0.5


@dataclasses.dataclass
class DepthStudyConfig:
  """The depth tables of De & Smith (2020): networks by methods.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`.
    methods_without_l2: names of methods to train also without L2.
    wide_resnet_depths: layers of the convolutional networks, each 6 n + 4.
    residual_mlp_depths: blocks of the fully connected networks.
    wide_resnet: everything else of the convolutional networks.
    residual_mlp: everything else of the fully connected networks.
    wide_resnet_search: the learning-rate search of each convolutional network.
    residual_mlp_search: the learning-rate search of each fully connected network.
  """

  methods: tuple[str, ...] = (
    "batch_norm",
    "batch_norm_zero_scale",
    "skipinit_inverse_sqrt_depth",
    "skipinit",
    "skipinit_one",
    "divide_by_sqrt2",
  )
  methods_without_l2: tuple[str, ...] = ()
  wide_resnet_depths: tuple[int, ...] = ()
  residual_mlp_depths: tuple[int, ...] = ()
  wide_resnet: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(model="wide_resnet")
  )
  residual_mlp: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(model="residual_mlp", width=64)
  )
  wide_resnet_search: SearchConfig = dataclasses.field(default_factory=SearchConfig)
  residual_mlp_search: SearchConfig = dataclasses.field(default_factory=SearchConfig)


@dataclasses.dataclass(frozen=True)
class DepthLabels:
  """What the searches of a depth study vary: see `TrainConfig`."""

  model: str
  depth: int
  width: int
  method: str
  l2: float


Result = study.SearchResult[DepthLabels]
Results = study.StudyResults[DepthLabels]


def depth_study(config: DepthStudyConfig) -> study.Study[DepthLabels]:
  """Returns the study of a configuration.

  Raises:
    UsageError: a list is empty or names a value twice, or a field is set that the
      study sets itself.
  """
  checks.check_config(
    config,
    varied={
      "model": "wide_resnet or residual_mlp",
      "depth": "wide_resnet_depths or residual_mlp_depths",
      "method": "methods",
      "learning_rate": "learning_rates of wide_resnet_search or residual_mlp_search",
    },
    optional=(
      "methods",
      "methods_without_l2",
      "wide_resnet_depths",
      "residual_mlp_depths",
    ),
  )
  networks = [
    (config.wide_resnet, config.wide_resnet_depths, config.wide_resnet_search),
    (config.residual_mlp, config.residual_mlp_depths, config.residual_mlp_search),
  ]
  networks = [network for network in networks if network[1]]
  if not networks:
    raise UsageError(
      "wide_resnet_depths and residual_mlp_depths are empty: name at least one depth."
    )
  columns = checks.with_and_without_l2(
    config.methods,
    config.methods_without_l2,
    **{base.model: base for base, _, _ in networks},
  )
  return study.Study(
    "depth_study",
    config,
    tuple(
      _search(
        dataclasses.replace(
          base, depth=depth, method=method, l2=base.l2 if with_l2 else 0.0
        ),
        with_l2,
        protocol,
      )
      for base, depths, protocol in networks
      for depth in depths
      for method, with_l2 in columns
    ),
  )


def _search(
  config: TrainConfig, with_l2: bool, protocol: SearchConfig
) -> study.Search[DepthLabels]:
  network = f"{config.model}_{config.depth}_{config.width}"
  return study.Search(
    name=f"{network}/{config.method}" + ("" if with_l2 else "_without_l2"),
    row=config.network_title,
    column=methods.get(config.method).title + ("" if with_l2 else ", no L2"),
    labels=DepthLabels(
      config.model, config.depth, config.width, config.method, config.l2
    ),
    config=config,
    protocol=protocol,
  )


class Published(NamedTuple):
  """A published result: test accuracy in %, and the exponents of rates that are 2^n.

  Attributes:
    accuracy: the mean test accuracy.
    deviation: its standard deviation.
    best: the optimal learning rate.
    lowest: the lowest rate within one deviation of it.
    highest: the highest such rate.
  """

  accuracy: float
  deviation: float
  best: int
  lowest: int
  highest: int

  def __str__(self) -> str:
    rates = format_rates(2.0**self.best, 2.0**self.lowest, 2.0**self.highest)
    return f"{self.accuracy}±{self.deviation}, {rates}"


_SOURCE = "De & Smith (2020), arXiv:2002.10444v1, tables 1 and 2"
_COLUMNS = (
  ("batch_norm", True),
  ("skipinit_inverse_sqrt_depth", True),
  ("skipinit", True),
  ("skipinit_one", True),
  ("divide_by_sqrt2", True),
  ("skipinit", False),
)
_ROWS: dict[int, tuple[tuple[float, float, int, int, int] | None, ...]] = {
  16: (
    (93.5, 0.1, -1, -1, -1),
    (93.0, 0.1, -2, -2, -1),
    (93.3, 0.1, -2, -2, -2),
    (93.0, 0.1, -2, -2, -1),
    (92.4, 0.1, -2, -2, -1),
    (89.8, 0.2, -3, -3, -3),
  ),
  100: (
    (94.7, 0.1, -1, -2, 0),
    (94.2, 0.1, -1, -2, -1),
    (94.2, 0.1, -2, -2, -2),
    None,
    (88.9, 0.4, -5, -5, -5),
    (91.7, 0.2, -2, -2, -2),
  ),
  1000: (
    (94.6, 0.1, -2, -3, 0),
    (94.2, 0.0, -1, -2, -1),
    (94.3, 0.2, -2, -3, -1),
    None,
    None,
    (92.1, 0.1, -2, -2, -2),
  ),
}
PUBLISHED: dict[tuple[int, str, bool], Published | None] = {
  (depth, *column): entry and Published(*entry)
  for depth, entries in _ROWS.items()
  for column, entry in zip(_COLUMNS, entries, strict=True)
}
"""Wide-ResNets of width 2 on CIFAR-10, by depth, method and whether they had L2.

None: the network does not train.
"""


def depth_claims(results: Results) -> list[Finding]:
  """Checks the claims on depth (De & Smith, 2020, tables 1 and 2)."""
  findings = []
  # The last one is a reviewer's question.
  for name in (
    "batch_norm",
    "batch_norm_zero_scale",
    "skipinit",
    "skipinit_inverse_sqrt_depth",
    "output_batch_norm",
  ):
    if mine := _with_l2(results.searches, name):
      claim = f"{methods.get(name).title} trains at every depth."
      findings.append(claims.trains_claim(claim, mine))
  for name, least in (("skipinit_one", 100), ("divide_by_sqrt2", 1000)):
    if mine := _with_l2(results.searches, name):
      claim = f"{methods.get(name).title} does not train at a depth of {least} or more."
      if deep := [search for search in mine if search.labels.depth >= least]:
        findings.append(claims.trains_claim(claim, deep, trains=False))
      else:
        findings.append(Finding(claim, None, "No network is so deep."))
  gaps = {
    skipinit.row: claims.accuracy_gap(skipinit, batch_norm)
    for skipinit in _with_l2(results.searches, "skipinit")
    for batch_norm in _with_l2(results.in_row(skipinit.row), "batch_norm")
    if skipinit.trains and batch_norm.trains
  }
  if gaps:
    holds = [gap.is_at_least(-_PUBLISHED_GAP) for gap in gaps.values()]
    findings.append(
      Finding(
        f"SkipInit, α = 0, is at most {_PUBLISHED_GAP} percentage points less accurate "
        "than batch norm.",
        claims.all_hold(holds),
        claims.format_gaps(gaps),
      )
    )
  return findings


def _with_l2(searches: Sequence[Result], name: str) -> list[Result]:
  return [
    search
    for search in searches
    if search.labels.method == name and search.labels.l2 > 0
  ]


def depth_report(results: Results) -> study.StudyReport:
  """Returns the bars by depth, and the tables beside the paper and batch norm."""
  dataset = report.dataset_title(results, results.searches[0].labels.model)
  bars = Figure(
    name="accuracy_by_depth",
    title="Test accuracy by depth and method",
    figure=figures.accuracy_bars(
      results, lambda search: (search.labels.model, search.labels.width)
    ),
    description="Bars of the test accuracy of each network by method; hatched bars "
    "mark methods that do not train.",
    note="Whiskers are one standard deviation. A method trains if its accuracy is "
    f"above {100 * results.threshold:.1f} %: always naming the most frequent class, "
    "and three standard errors.",
  )
  sections = []
  if published := published_table(results):
    text = (
      "On another data set or network the numbers differ for many reasons, and only "
      "which networks train is compared."
    )
    sections.append(Section("Beside the published results", text, [published]))
  return study.StudyReport(
    f"Depth study on {dataset}",
    f"Test accuracy of residual networks on {dataset}, by depth and method, each at "
    "its best learning rate, beside the results of De & Smith (2020).",
    [bars],
    sections,
  )


def published_table(results: Results) -> Table | None:
  """Returns measured beside published results of the same depth and method.

  Returns:
    The table; None if nothing is published for any of the study's depths.
  """
  rows: list[list[str | Entry]] = []
  for search in results.searches:
    labels = search.labels
    cell = (labels.depth, labels.method, labels.l2 > 0)
    if cell in PUBLISHED:
      published = PUBLISHED[cell]
      dataset = results.config[labels.model]["dataset"]
      same = (labels.model, labels.width, dataset) == ("wide_resnet", 2, "cifar10")
      rows.append(
        [
          search.row,
          search.column,
          report.accuracy_entry(search),
          str(published or "does not train"),
          _agreement(search, published, same),
        ]
      )
  if not rows:
    return None
  dataset = report.dataset_title(results, results.searches[0].labels.model)
  return Table(
    name="published",
    title="Measured and published",
    header=[
      "network",
      "method",
      f"measured: {dataset}",
      f"published: {data.title('cifar10')}, Wide-ResNet of this depth and width 2",
      "agreement",
    ],
    rows=rows,
    note=f"Published: {_SOURCE}. Differences are measured minus published, in "
    "percentage points, with the root of the sum of both squared deviations; within "
    "two of these they count as agreement.",
  )


def _agreement(search: Result, published: Published | None, same: bool) -> Entry:
  """Compares numbers in the same setting, and elsewhere only what trains."""
  if search.trains != (published is not None):
    return Entry(
      f"differs: {'trains' if search.trains else 'does not train'} here", "bad"
    )
  if published is None:
    return Entry("neither trains", "good")
  if not same:
    return Entry("both train", "good")
  gap = Points.of(search) - Points(published.accuracy, published.deviation)
  if gap.error is None:
    return Entry(f"both train, {gap}", "good")
  agrees = abs(gap.value) <= 2 * gap.error
  return Entry(
    f"{'agrees' if agrees else 'differs'}: {gap}", "good" if agrees else "bad"
  )


study.register(
  study.StudyKind(
    "depth_study",
    DepthLabels,
    ("network", "method"),
    depth_claims,
    depth_report,
    depth_study,
  )
)
