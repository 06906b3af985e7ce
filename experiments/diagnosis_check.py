"""Checks the verdicts of `analysis.diagnose` against short trainings on digits.

Each cell is a network: a method, a depth and an initial alpha. It is trained for a few
epochs at several learning rates, and diagnosed at initialization. The limits of
`analysis.diagnose` were chosen by cells of the part "tuned", and were final before any
cell of the part "judged" was trained: it has other depths, alphas and widths, and
deeper convolutional networks.

Example:
  python -m experiments.diagnosis_check --workdir=/tmp/diagnosis
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import program, study_program
from skipinit_jax import analysis, data, document, methods, studies
from skipinit_jax.document import Table
from skipinit_jax.files import write_json
from skipinit_jax.studies import Search, SearchConfig, Study, StudyKind, StudyReport
from skipinit_jax.training import TrainConfig

_TRAIN = TrainConfig(batch_size=64, epochs=4, schedule="constant", l2=0.0)
_SEARCH = SearchConfig(
  learning_rates=(2**-10, 2**-7, 2**-4), extend=False, num_seeds=1, best_of=1
)
# Half way to perfect: chance is 10 %, and most that train reach 80 % or more.
_TRAINS_ABOVE = 0.5

# At the top level, because the processes that train import this module.
methods.register(
  dataclasses.replace(
    methods.get("unnormalized"), name="halve", title="divide by 2", sum_scale=0.5
  )
)


@dataclasses.dataclass(frozen=True)
class Cell:
  """A network.

  Attributes:
    part: "tuned" or "judged".
    method: a name in `methods.NAMES`, or "halve" for a sum divided by 2.
    depth: blocks of a fully connected network, layers of a Wide-ResNet.
    alpha: initial factor on the branch, of method "skipinit_one" only.
    width: features, or factor on those of a Wide-ResNet.
    layers_per_block: layers of one branch of a fully connected network.
    model: "residual_mlp" or "wide_resnet".
  """

  part: str
  method: str
  depth: int
  alpha: float | None = None
  width: int = 48
  layers_per_block: int = 1
  model: str = "residual_mlp"

  @property
  def train_config(self) -> TrainConfig:
    """How it is trained."""
    fields = dataclasses.asdict(self)
    del fields["part"]
    return dataclasses.replace(_TRAIN, **fields)

  @property
  def title(self) -> str:
    """Its name for people."""
    layers = "" if self.layers_per_block == 1 else ", 2-layer branches"
    method = methods.get(self.method).title
    if self.alpha is not None:
      method = f"SkipInit, α = {self.alpha:.3g}"
    return f"{self.train_config.network_title}{layers}, {method}"


@dataclasses.dataclass
class DiagnosisConfig:
  """Which cells there are.

  Attributes:
    max_depth: the largest depth; less is for a quick look.
  """

  max_depth: int = 500


def cells() -> Iterator[Cell]:
  """Yields the cells of both parts."""
  for depth in (16, 64, 256):
    for alpha in sorted({1.0, 0.5, 0.25, depth**-0.5, 0.0}):
      yield Cell("tuned", "skipinit_one", depth, alpha)
    for name in ("divide_by_sqrt2", "batch_norm", "batch_norm_divide_by_sqrt2"):
      yield Cell("tuned", name, depth)
  for name in ("divide_by_sqrt2", "batch_norm_divide_by_sqrt2"):
    yield Cell("tuned", name, 128)
  for depth in (16, 64):
    yield Cell("tuned", "halve", depth)

  for depth in (24, 96, 400):
    for alpha in (1.0, 0.35, 0.1):
      yield Cell("tuned", "skipinit_one", depth, alpha, width=64)
  two_layers = functools.partial(Cell, width=32, layers_per_block=2)
  for depth in (8, 32, 100):
    for name in ("divide_by_sqrt2", "batch_norm_divide_by_sqrt2", "unnormalized"):
      yield two_layers("tuned", name, depth)
  for name, depth in (("batch_norm", 100), ("fixup", 100), ("halve", 8), ("halve", 32)):
    yield two_layers("tuned", name, depth)
  convolutional = functools.partial(Cell, width=1, model="wide_resnet")
  for name in ("batch_norm", "skipinit", "unnormalized"):
    yield convolutional("tuned", name, 16)

  for depth in (12, 48, 192, 500):
    for alpha in (0.7, 0.2, 0.05):
      yield Cell("judged", "skipinit_one", depth, alpha, width=40)
  for name in ("divide_by_sqrt2", "batch_norm_divide_by_sqrt2"):
    for depth in (20, 50, 160):
      yield Cell("judged", name, depth, width=56)
  yield Cell("judged", "batch_norm", 500, width=56)
  for depth in (5, 18, 60):
    yield two_layers("judged", "unnormalized", depth)
  for name, depth in (("fixup", 300), ("halve", 4), ("halve", 20)):
    yield two_layers("judged", name, depth)
  for depth in (28, 100):
    for name in (
      "batch_norm",
      "batch_norm_divide_by_sqrt2",
      "skipinit",
      "skipinit_inverse_sqrt_depth",
      "divide_by_sqrt2",
      "unnormalized",
    ):
      yield convolutional("judged", name, depth)
  for name in ("batch_norm", "skipinit", "divide_by_sqrt2"):
    yield convolutional("judged", name, 220)


def diagnosis_study(config: DiagnosisConfig) -> Study[Cell]:
  """Returns the study of the cells' trainings."""
  studies.checks.check_config(config, varied={})
  searches = [
    Search(
      name="/".join(str(value) for value in dataclasses.astuple(cell)),
      row=cell.title,
      column=cell.part,
      labels=cell,
      config=cell.train_config,
      protocol=_SEARCH,
    )
    for cell in cells()
    if cell.depth <= config.max_depth
  ]
  return Study("diagnosis_check", config, tuple(searches))


studies.register(
  StudyKind(
    "diagnosis_check",
    Cell,
    ("network", "part"),
    claims=lambda results: [],
    report=lambda results: StudyReport("Does the diagnosis agree with training?", ""),
    make=diagnosis_study,
  )
)


def diagnose(cell: Cell) -> dict[str, Any]:
  """Returns what the diagnosis of a cell at its first batch says, for JSON."""
  dataset = data.load(_TRAIN.dataset)
  model = cell.train_config.make_model(dataset.num_classes)
  pixels = jnp.asarray(dataset.train.images[: _TRAIN.batch_size])
  images = data.augmentation.normalize(pixels, dataset.mean, dataset.std)

  @jax.jit
  def measure(key: jax.Array) -> analysis.Signal:
    variables = model.init(key, images, train=True)
    return analysis.measure.signal(model, variables, images, train=True)

  signal = measure(jax.random.key(_TRAIN.seed))
  diagnosis = analysis.diagnose_signal(signal)
  return {
    **dataclasses.asdict(cell),
    "forward_growth": diagnosis.forward_growth,
    "gradient_growth": diagnosis.gradient_growth,
    "median_gradient_growth": float(np.median(signal.relative_gradient)),
    "cosine": diagnosis.cosine,
    "healthy": diagnosis.healthy,
    "verdict": diagnosis.text,
  }


def compare(results: studies.StudyResults[Cell]) -> list[dict[str, Any]]:
  """Returns for each cell what its diagnosis says and what its training did."""
  rows = []
  for search in results.searches:
    runs = [run for run in results.runs if run.search == search.name]
    runs.sort(key=lambda run: -run.learning_rate)
    accuracies = [run.test_accuracy or 0.0 for run in runs]
    trained = {"accuracies": accuracies, "test_accuracy": max(accuracies)}
    trained["trains"] = max(accuracies) >= _TRAINS_ABOVE
    rows.append(diagnose(search.labels) | trained)
  return rows


def confusion(rows: list[dict[str, Any]]) -> Table:
  """Counts the cells by verdict and training."""
  counts = collections.Counter(
    (row["part"], row["healthy"], row["trains"]) for row in rows
  )
  return Table(
    name="confusion",
    title="Verdict and training",
    header=["cells", "verdict", "trains", "does not train"],
    rows=[
      [
        part,
        verdict,
        *(
          document.Entry(str(count), "good" if healthy == trains else "bad")
          if (count := counts[part, healthy, trains])
          else "0"
          for trains in (True, False)
        ),
      ]
      for part in ("tuned", "judged")
      for verdict, healthy in (("healthy", True), ("faulty", False))
    ],
    note="A network trains if its test accuracy at the best learning rate is at least "
    f"{100 * _TRAINS_ABOVE:.0f} %.",
  )


def write_diagnosis(results: studies.StudyResults[Cell], workdir: str) -> None:
  """Compares the cells with their diagnoses: writes diagnosis.json, prints a table."""
  rows = compare(results)
  write_json(pathlib.Path(workdir, "diagnosis.json"), {"cells": rows})
  document.print_table(confusion(rows))


main = study_program.StudyProgram(
  diagnosis_study, {"digits": DiagnosisConfig}, "digits", finish=write_diagnosis
)

if __name__ == "__main__":
  program.run(main)
