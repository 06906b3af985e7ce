"""The ImageNet study: accuracy by method and batch size at one scaled learning rate."""

import dataclasses
import math

from skipinit_jax import methods
from skipinit_jax.document import Entry, Figure, Finding, Section, Table
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import checks, claims, figures, report, study
from skipinit_jax.studies.batch_size import ghost_batch_size
from skipinit_jax.studies.claims import Points
from skipinit_jax.studies.search import SearchConfig
from skipinit_jax.training import TrainConfig


@dataclasses.dataclass
class ImageNetStudyConfig:
  """The ImageNet table of De & Smith (2020): methods by batch sizes.

  Each network is of its method's own version of ResNet (Fixup's is post-activation, as
  in Fixup's own code), unless `train.version` chooses one for all.

  Attributes:
    methods: names in `skipinit_jax.methods.NAMES`.
    batch_sizes: examples of a step.
    ghost_batch_size: examples of a ghost batch of batch norm, for larger batches;
      None: normalize whole batches.
    num_seeds: runs of each method and batch size.
    train: the network and its training. Its learning rate is for its batch size: that
      of another batch size is in proportion to it (Goyal et al., 2017).
  """

  methods: tuple[str, ...] = (
    "batch_norm",
    "fixup",
    "skipinit_biases",
    "fixup_dropout",
    "regularized_skipinit",
  )
  batch_sizes: tuple[int, ...] = (256, 1024, 4096)
  ghost_batch_size: int | None = 256
  num_seeds: int = 1
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


@dataclasses.dataclass(frozen=True)
class ImageNetLabels:
  """What the searches of an ImageNet study vary: see `TrainConfig`."""

  method: str
  batch_size: int


Result = study.SearchResult[ImageNetLabels]
Results = study.StudyResults[ImageNetLabels]


def imagenet_study(config: ImageNetStudyConfig) -> study.Study[ImageNetLabels]:
  """Returns the study of a configuration.

  Raises:
    UsageError: a list is empty or names a value twice, a number is not allowed, or a
      field is set that the study sets itself.
  """
  checks.check_config(
    config, varied={"method": "methods", "ghost_batch_size": "ghost_batch_size"}
  )
  if config.num_seeds < 1:
    raise UsageError(f"num_seeds is {config.num_seeds}: it must be at least 1.")
  train = config.train
  train.validate()
  searches = []
  for name in config.methods:
    method = methods.get(name)
    for batch_size in config.batch_sizes:
      if batch_size < 1:
        raise UsageError(f"batch_sizes has {batch_size}: each must be at least 1.")
      rate = train.learning_rate * batch_size / train.batch_size
      run = dataclasses.replace(
        train,
        method=name,
        batch_size=batch_size,
        learning_rate=rate,
        ghost_batch_size=ghost_batch_size(config.ghost_batch_size, name, batch_size),
      )
      searches.append(
        study.Search(
          name=f"{name}/batch_{batch_size}",
          row=method.title,
          column=f"batch {batch_size}",
          labels=ImageNetLabels(name, batch_size),
          config=run,
          protocol=SearchConfig(
            learning_rates=(rate,),
            extend=False,
            num_seeds=config.num_seeds,
            best_of=config.num_seeds,
          ),
        )
      )
  return study.Study("imagenet_study", config, tuple(searches))


_SOURCE = "De & Smith (2020), arXiv:2002.10444v1"
_BATCH_SIZES = (256, 1024, 4096)
_ROWS: dict[str, tuple[tuple[float, float], ...]] = {
  "batch_norm": ((75.0, 92.2), (74.9, 92.1), (74.9, 91.9)),
  "fixup": ((74.8, 91.8), (74.6, 91.7), (73.0, 90.6)),
  "skipinit_biases": ((74.9, 91.9), (74.6, 91.8), (70.8, 89.2)),
  "fixup_dropout": ((75.8, 92.5), (75.6, 92.5), (74.8, 91.8)),
  "regularized_skipinit": ((75.6, 92.4), (75.5, 92.5), (72.7, 90.7)),
}
PUBLISHED: dict[tuple[str, int], tuple[float, float]] = {
  (method, batch_size): accuracies
  for method, row in _ROWS.items()
  for batch_size, accuracies in zip(_BATCH_SIZES, row, strict=True)
}
"""ResNet-50, 90 epochs, one crop: top-1 and top-5 accuracy in % by method and batch."""
_PUBLISHED_SETTING = {
  "dataset": "imagenet2012",
  "model": "resnet",
  "depth": 50,
  "epochs": 90,
}


def imagenet_claims(results: Results) -> list[Finding]:
  """Checks what the ImageNet table of De & Smith (2020) shows."""
  as_accurate = "is at least as accurate as batch norm at batch sizes up to 1024."
  worse = "At batch sizes of 4096 and more, batch norm is more accurate than"
  found = []
  for claim, name, batch_sizes, sign in (
    (f"Regularized SkipInit {as_accurate}", "regularized_skipinit", (1, 1024), 1),
    (f"Fixup with dropout {as_accurate}", "fixup_dropout", (1, 1024), 1),
    (f"{worse} Regularized SkipInit.", "regularized_skipinit", (4096, math.inf), -1),
  ):
    if gaps := _gaps_to_batch_norm(results, name, *batch_sizes):
      holds = [
        Points(sign * gap.value, gap.error).is_at_least(0.0) for gap in gaps.values()
      ]
      found.append(Finding(claim, claims.all_hold(holds), claims.format_gaps(gaps)))
  return found


def _gaps_to_batch_norm(
  results: Results, method: str, smallest: float, largest: float
) -> dict[str, Points]:
  """Returns by batch size how much more accurate a method is than batch norm."""
  trained = {
    (search.labels.method, search.labels.batch_size): search
    for search in results.searches
    if search.trains and smallest <= search.labels.batch_size <= largest
  }
  return {
    search.column: claims.accuracy_gap(search, trained["batch_norm", size])
    for (name, size), search in trained.items()
    if name == method and ("batch_norm", size) in trained
  }


def imagenet_report(results: Results) -> study.StudyReport:
  """Returns the bars by method, and the table beside the paper."""
  dataset = report.dataset_title(results)
  bars = Figure(
    name="accuracy_by_batch_size",
    title="Test accuracy by method and batch size",
    figure=figures.accuracy_bars(results),
    description="Bars of the test accuracy of each method by batch size.",
    note="Whiskers are one standard deviation.",
  )
  published = published_table(results)
  return study.StudyReport(
    f"Methods and batch sizes on {dataset}",
    f"{report.network_title(results)} on {dataset}: test accuracy by method and batch "
    "size, at one learning rate in proportion to the batch size, beside the results of "
    "De & Smith (2020).",
    [bars],
    [Section("Beside the published results", "", [published])] if published else [],
  )


def published_table(results: Results) -> Table | None:
  """Returns measured beside published results of the same method and batch size.

  Returns:
    The table; None if nothing is published for any of the study's batch sizes.
  """
  train = results.config["train"]
  same = all(train[name] == value for name, value in _PUBLISHED_SETTING.items())
  rows: list[list[str | Entry]] = []
  for search in results.searches:
    cell = (search.labels.method, search.labels.batch_size)
    if cell not in PUBLISHED:
      continue
    published_top1, published_top5 = PUBLISHED[cell]
    measured: str | Entry = Entry("does not train", "bad")
    agreement: str | Entry = Entry("differs: does not train here", "bad")
    if search.trains and search.test_accuracy is not None:
      top1, top5 = 100 * search.test_accuracy, _top5_accuracy(results, search)
      measured = f"{top1:.1f}/{'-' if top5 is None else f'{100 * top5:.1f}'}"
      gap = Points(top1 - published_top1, None)
      agreement = str(gap) if same else "another setting"
    published = f"{published_top1}/{published_top5}"
    rows.append([search.row, str(cell[1]), measured, published, agreement])
  if not rows:
    return None
  return Table(
    name="published",
    title="Measured and published: top-1/top-5 accuracy in %",
    header=[
      "method",
      "batch size",
      f"measured: {report.dataset_title(results)}, {report.network_title(results)}, "
      f"{train['epochs']} epochs",
      "published: ImageNet, ResNet-50, 90 epochs",
      "measured minus published",
    ],
    rows=rows,
    note=f"Published, without deviations: {_SOURCE}. Differences are of top-1 "
    "accuracy, in percentage points, and taken in the published setting only. The "
    "published learning rates are not known to us: ours are 0.1 at a batch size of 256 "
    "by default (Goyal et al., 2017).",
  )


def _top5_accuracy(results: Results, search: Result) -> float | None:
  """Returns the mean over the seeds; None if a seed did not measure it."""
  runs = results.at_best_rate(search)
  known = [run.test_top5_accuracy for run in runs if run.test_top5_accuracy is not None]
  return sum(known) / len(known) if known and len(known) == len(runs) else None


study.register(
  study.StudyKind(
    "imagenet_study",
    ImageNetLabels,
    ("method", "batch size"),
    imagenet_claims,
    imagenet_report,
    imagenet_study,
  )
)
