"""Checks the verdicts of `analysis.diagnose` against short trainings on digits.

Each cell is a network of a family that people train, healthy or broken: see
`experiments/diagnosis_families.py`. It is trained by SGD and by Adam at a few learning
rates, and diagnosed at initialization. The limits of `analysis.diagnose` are chosen by
cells of the part "tuned". They were first final before any cell of the part "judged"
was trained. What these cells then showed to be missing was added, and judged by cells
of the part "fresh", which became a part of the limits in turn. Today's limits were
final before any cell of the part "last" was trained.

Example:
  python -m experiments.diagnosis_check --workdir=/tmp/diagnosis
"""

import collections
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import diagnosis_families, program, study_program
from experiments.diagnosis_families import BLOCKS, Cell, model_name
from skipinit_jax import analysis, data, document, studies
from skipinit_jax.document import Table
from skipinit_jax.errors import unknown_name
from skipinit_jax.files import write_json
from skipinit_jax.studies import SearchConfig, checks
from skipinit_jax.training import TrainConfig

# Half way to perfect: chance is 10 %.
_TRAINS_ABOVE = 0.5
# Examples whose signal is measured.
_NUM_MEASURED = 64
_PARTS = ("tuned", "judged", "fresh", "last")
_OPTIMIZERS = {"sgd": "SGD", "adamw": "Adam"}


@dataclasses.dataclass
class DiagnosisCheckConfig:
  """Networks that people train, healthy and broken, by two optimizers.

  Attributes:
    parts: which cells to check: tuned, judged, fresh or last.
    families: the families of networks.
    max_depth: the largest depth; less is for a quick look.
    train: how each is trained.
    sgd: the learning rates of SGD.
    adam: the learning rates of Adam.
  """

  parts: tuple[str, ...] = _PARTS
  families: tuple[str, ...] = tuple(diagnosis_families.VARIANTS)
  max_depth: int = 1000
  train: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(
      batch_size=16,
      epochs=3,
      eval_every_epochs=3,
      schedule="constant",
      l2=0.0,
      weight_decay=0.0,
    )
  )
  sgd: SearchConfig = dataclasses.field(
    default_factory=lambda: _rates(2**-8, 2**-5, 2**-3)
  )
  adam: SearchConfig = dataclasses.field(
    default_factory=lambda: _rates(2**-12, 2**-9, 2**-7)
  )


def _rates(*rates: float) -> SearchConfig:
  return SearchConfig(rates, extend=False, num_seeds=1, best_of=1)


@dataclasses.dataclass(frozen=True)
class DiagnosisLabels:
  """What the searches vary: a cell, and the optimizer of a `TrainConfig`."""

  part: str
  family: str
  variant: str
  depth: int
  optimizer: str

  @property
  def cell(self) -> Cell:
    """The network."""
    return Cell(self.part, self.family, self.variant, self.depth)


Result = studies.SearchResult[DiagnosisLabels]
Results = studies.StudyResults[DiagnosisLabels]


def diagnosis_check(config: DiagnosisCheckConfig) -> studies.Study[DiagnosisLabels]:
  """Returns the study of a configuration.

  Raises:
    UsageError: a part or family is unknown, or a list is empty or names one twice.
  """
  checks.check_config(
    config,
    varied={
      # The networks are for images of its size.
      "dataset": "digits",
      "model": "families",
      "depth": "max_depth",
      "optimizer": "sgd and adam",
      "learning_rate": "sgd.learning_rates and adam.learning_rates",
    },
  )
  for name, values, known in (
    ("part", config.parts, _PARTS),
    ("family", config.families, [*diagnosis_families.VARIANTS]),
  ):
    for value in values:
      if value not in known:
        raise unknown_name(name, value, known)
  searches = []
  for cell in sorted(diagnosis_families.cells(), key=lambda cell: cell.depth):
    if (
      cell.part in config.parts
      and cell.family in config.families
      and cell.depth <= config.max_depth
    ):
      model = model_name(cell.family, cell.variant)
      searches += [
        studies.Search(
          name=f"{model}_{cell.depth}/{optimizer}",
          row=f"{cell.family} {cell.depth}, {cell.variant}",
          column=title,
          labels=DiagnosisLabels(*cell, optimizer),
          config=dataclasses.replace(
            config.train, model=model, depth=cell.depth, optimizer=optimizer
          ),
          protocol=config.sgd if optimizer == "sgd" else config.adam,
        )
        for optimizer, title in _OPTIMIZERS.items()
      ]
  return studies.Study("diagnosis_check", config, tuple(searches))


def trains(search: Result) -> bool:
  """Tells whether the best rate brings the test accuracy half way to perfect."""
  return (search.test_accuracy or 0.0) >= _TRAINS_ABOVE


def diagnose(cell: Cell, images: jax.Array) -> analysis.Diagnosis:
  """Returns what today's limits say of a cell, as it is initialized."""
  model = TrainConfig(
    model=model_name(cell.family, cell.variant), depth=cell.depth
  ).make_model(num_classes=10)

  @jax.jit
  def measured(key: jax.Array) -> analysis.Signal:
    variables = model.init(key, images, train=True)
    return analysis.measure.signal(model, variables, images, blocks=BLOCKS, train=True)

  return analysis.diagnose_signal(measured(jax.random.key(0)))


def judge(results: Results) -> list[dict[str, Any]]:
  """Returns each cell's verdict beside what training said, for JSON."""
  dataset = data.load("digits")
  images = data.augmentation.normalize(
    jnp.asarray(dataset.train.images[:_NUM_MEASURED]), dataset.mean, dataset.std
  )
  by_cell: dict[Cell, list[Result]] = {}
  for search in results.searches:
    by_cell.setdefault(search.labels.cell, []).append(search)
  rows = []
  for cell, searches in by_cell.items():
    print(f"Diagnosis: {searches[0].row}", file=sys.stderr)
    verdict = diagnose(cell, images)
    with np.errstate(all="ignore"):
      sensitivity = float(np.median(verdict.signal.relative_sensitivity))
    rows.append(
      {
        **cell._asdict(),
        "accuracies": {
          search.column: [rate.test_accuracy for rate in search.rates]
          for search in searches
        },
        "healthy": {"SGD": verdict.healthy, "Adam": verdict.healthy_with_adam},
        "trains": {search.column: trains(search) for search in searches},
        "forward_growth": verdict.forward_growth,
        "head": verdict.head,
        "sensitivity_growth": verdict.sensitivity_growth,
        "median_sensitivity": sensitivity,
        "cosine": verdict.cosine,
        "verdict": verdict.text,
      }
    )
  return rows


def confusion(rows: Sequence[Mapping[str, Any]], part: str) -> list[dict[str, str]]:
  """Counts cells and optimizers of a part by family, verdict and training."""
  counts = collections.Counter(
    (family, row["healthy"][optimizer], row["trains"][optimizer])
    for row in rows
    if row["part"] == part
    for optimizer in _OPTIMIZERS.values()
    for family in (row["family"], "all")
  )
  kinds = {
    "healthy, trains": (True, True),
    "faulty, does not train": (False, False),
    "faulty, but trains": (False, True),
    "healthy, but does not train": (True, False),
  }
  return [
    {
      "family": family,
      **{title: str(counts[family, *kind]) for title, kind in kinds.items()},
    }
    for family in (*diagnosis_families.VARIANTS, "all")
    if any(counts[family, *kind] for kind in kinds.values())
  ]


def finish(results: Results, workdir: str) -> None:
  """Judges a finished study, writes diagnosis.json and prints its tables."""
  rows = judge(results)
  tables = {part: confusion(rows, part) for part in results.config["parts"]}
  tables = {part: table for part, table in tables.items() if table}
  write_json(
    pathlib.Path(workdir) / "diagnosis.json", {"cells": rows, "tables": tables}
  )
  for part, table in tables.items():
    document.print_table(
      Table(
        name=part,
        title=f"Verdict and training, {part}",
        header=[*table[0]],
        rows=[[*row.values()] for row in table],
        note="Each network counts twice, with SGD and with Adam. It trains if the best "
        "of its learning rates brings the test accuracy to "
        f"{100 * _TRAINS_ABOVE:.0f} % in {results.config['train']['epochs']} epochs.",
      )
    )


def report(results: Results) -> studies.StudyReport:
  """Returns what stands above the table of accuracies."""
  return studies.StudyReport(
    "Networks whose diagnosis is checked",
    "Small networks of families that people train, by SGD and by Adam, on digits.",
  )


studies.register(
  studies.StudyKind(
    "diagnosis_check",
    DiagnosisLabels,
    ("network", "optimizer"),
    # A verdict needs the network, not only its results: see `judge`.
    lambda results: [],
    report,
    diagnosis_check,
  )
)

main = study_program.StudyProgram(
  diagnosis_check, {"full": DiagnosisCheckConfig}, default="full", finish=finish
)

if __name__ == "__main__":
  program.run(main)
