"""Checks the verdicts of `analysis.diagnose` against short trainings on digits.

Each cell is a network of a family that people train, healthy or broken: see
`experiments/diagnosis_families.py`. It is diagnosed at initialization, and trained by
SGD and by Adam at a few learning rates. The limits of `analysis.diagnose` are chosen by
cells of the part "tuned". They were first final before any cell of the part "judged"
was trained. What these cells then showed to be missing was added, and judged by cells
of the part "fresh", which became a part of the limits in turn. Today's limits were
final before any cell of the part "last" was trained.

The program resumes: cells that the workdir has are not trained again, only judged by
today's limits.

Example:
  python -m experiments.diagnosis_check --workdir=/tmp/diagnosis
"""

import collections
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags, logging

from experiments import diagnosis_families, program
from experiments.diagnosis_families import Cell
from skipinit_jax import analysis, data, document
from skipinit_jax.analysis import measure
from skipinit_jax.document import Table
from skipinit_jax.files import from_json, make_directory, to_json, write_json

_BATCH_SIZE = 16
# Twice through all images.
_STEPS = 224
# Each optimizer's learning rates, the likeliest first.
_RATES = {"SGD": (2**-5, 2**-8, 2**-3), "Adam": (2**-9, 2**-12, 2**-7)}
# Half way to perfect: chance is 10 %.
_TRAINS_ABOVE = 0.5
# A run below this behind so many steps ends, which saves the hour of the deepest.
_HOPELESS = 0.2, 96
# How much of the mean stays when a batch's accuracy, before its step, joins it.
_MEMORY = 0.9

PARTS = ("tuned", "judged", "fresh", "last")


@functools.partial(jax.jit, static_argnums=0)
def _train(
  model: Any,
  variables: Any,
  images: jax.Array,
  labels: jax.Array,
  rate: jax.Array,
  adam: jax.Array,
) -> jax.Array:
  """Trains until it is known to train, diverges, or has had its steps.

  One program for both optimizers: compiling takes longer than training.

  Args:
    images: of all batches in their order, [steps, batch size, ...].
    rate: learning rate.
    adam: whether to take Adam's steps or those of SGD with momentum 0.9.

  Returns:
    The running accuracy on batches before their step.
  """
  state = {name: value for name, value in variables.items() if name != "params"}
  optimizers = optax.sgd(rate, momentum=0.9), optax.adam(rate)

  def loss(params: Any, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits, _ = model.apply(
      {"params": params, **state},
      images[step],
      train=True,
      rngs=jax.random.fold_in(jax.random.key(1), step),
      mutable=list(state),
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[step])
    return losses.mean(), (logits.argmax(-1) == labels[step]).mean()

  def update(carry: Any) -> Any:
    params, opt_states, accuracy, step, _ = carry
    (value, correct), gradient = jax.value_and_grad(loss, has_aux=True)(params, step)
    pairs = [
      optimizer.update(gradient, opt_state)
      for optimizer, opt_state in zip(optimizers, opt_states, strict=True)
    ]
    (sgd, adams), opt_states = zip(*pairs, strict=True)
    updates = jax.tree.map(lambda a, b: jnp.where(adam, a, b), adams, sgd)
    accuracy = _MEMORY * accuracy + (1 - _MEMORY) * correct
    params = optax.apply_updates(params, updates)
    return params, opt_states, accuracy, step + 1, jnp.isfinite(value)

  def goes_on(carry: Any) -> jax.Array:
    _, _, accuracy, step, finite = carry
    hopeless = (accuracy < _HOPELESS[0]) & (step >= _HOPELESS[1])
    return finite & (step < len(labels)) & (accuracy < _TRAINS_ABOVE) & ~hopeless

  params = variables["params"]
  opt_states = tuple(optimizer.init(params) for optimizer in optimizers)
  start = params, opt_states, jnp.array(0.1), 0, jnp.array(True)
  _, _, accuracy, _, finite = jax.lax.while_loop(goes_on, update, start)
  return jnp.where(finite, accuracy, 0)


def _batches() -> tuple[jax.Array, jax.Array]:
  dataset = data.load("digits")
  splits = dataset.train, dataset.test
  pixels = np.concatenate([split.images for split in splits])
  labels = np.concatenate([split.labels for split in splits])
  rng = np.random.default_rng(0)
  passes = -(-_STEPS * _BATCH_SIZE // len(labels))
  order = np.concatenate([rng.permutation(len(labels)) for _ in range(passes)])
  order = order[: _STEPS * _BATCH_SIZE].reshape(_STEPS, _BATCH_SIZE)
  images = data.augmentation.normalize(jnp.asarray(pixels), dataset.mean, dataset.std)
  return images[order], jnp.asarray(labels)[order]


def check(cell: Cell, images: jax.Array, labels: jax.Array) -> dict[str, Any]:
  """Measures and trains a cell.

  Returns:
    Its signal at the first batches and its accuracies, for JSON.
  """
  model = cell.make()
  blocks = measure.Blocks() if cell.blocks is None else measure.Blocks(cell.blocks)
  batch = images[:4].reshape(-1, *images.shape[2:])

  @jax.jit
  def initialize(key: jax.Array) -> tuple[Any, analysis.Signal]:
    variables = model.init(key, batch, train=True)
    return variables, measure.signal(model, variables, batch, blocks=blocks, train=True)

  variables, signal = initialize(jax.random.key(0))
  accuracies: dict[str, list[float]] = {}
  for name, rates in _RATES.items():
    of_rates = accuracies.setdefault(name, [])
    for rate in rates:
      accuracy = float(_train(model, variables, images, labels, rate, name == "Adam"))
      of_rates.append(round(accuracy, 3))
      if accuracy >= _TRAINS_ABOVE:
        break
  return dataclasses.asdict(cell) | {
    "accuracies": accuracies,
    "signal": {
      name: [float(f"{v:.8g}") for v in np.atleast_1d(getattr(signal, name))]
      for name in _MEASURED
    },
  }


_MEASURED = (
  "second_moment",
  "gradient_second_moment",
  "cosine",
  "position_cosine",
  "gradient_spread",
  "skip_second_moment",
  "branch_second_moment",
  "moving_variance",
  "head",
)


def judge(row: dict[str, Any]) -> dict[str, Any]:
  """Returns what today's limits say of a measured cell, beside what training said."""
  measured = {name: np.array(row["signal"][name], float) for name in _MEASURED}
  names = [str(index) for index in range(1, len(measured["moving_variance"]) + 1)]
  unknown = np.full(len(names), np.nan)
  signal = analysis.Signal(
    names=tuple(names),
    **measured | {"head": measured["head"][0]},
    variance=np.full(len(names) + 1, np.nan),
    skip_variance=unknown,
    branch_variance=unknown,
    sum_second_moment=unknown,
  )
  diagnosis = analysis.diagnose_signal(signal)
  trains = {
    name: max(values) >= _TRAINS_ABOVE for name, values in row["accuracies"].items()
  }
  with np.errstate(all="ignore"):
    median = float(np.median(signal.relative_sensitivity))
  told = {name: value for name, value in row.items() if name != "signal"}
  return told | {
    "healthy": {"SGD": diagnosis.healthy, "Adam": diagnosis.healthy_with_adam},
    "trains": trains,
    "forward_growth": diagnosis.forward_growth,
    "head": diagnosis.head,
    "sensitivity_growth": diagnosis.sensitivity_growth,
    "median_sensitivity": median,
    "cosine": diagnosis.cosine,
    "verdict": diagnosis.text,
  }


def confusion(rows: list[dict[str, Any]], part: str) -> list[dict[str, str]]:
  """Counts cells and optimizers of a part by family, verdict and training."""
  counts = collections.Counter(
    (family, row["healthy"][optimizer], row["trains"][optimizer])
    for row in rows
    if row["part"] == part
    for optimizer in _RATES
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


def main(workdir: str, parts: list[str], families: list[str], max_depth: int) -> None:
  """Checks the chosen cells that the workdir does not have, and judges all it has."""
  folder = pathlib.Path(workdir)
  make_directory(folder)
  log = folder / "cells.jsonl"
  rows = [from_json(json.loads(line)) for line in _lines(log)]
  done = {(row["family"], row["variant"], row["depth"]) for row in rows}
  images, labels = _batches()
  cells = [
    cell
    for part in parts
    for cell in sorted(diagnosis_families.cells(), key=lambda cell: cell.depth)
    if cell.part == part and cell.family in families and cell.depth <= max_depth
  ]
  for cell in cells:
    if (cell.family, cell.variant, cell.depth) in done:
      continue
    row = check(cell, images, labels)
    with log.open("a", encoding="utf-8") as file:
      file.write(json.dumps(to_json(row)) + "\n")
    rows.append(row)
    logging.info("%s: %s", cell.name, row["accuracies"])
  rows = [judge(row) for row in rows]
  tables = {part: confusion(rows, part) for part in PARTS}
  tables = {part: table for part, table in tables.items() if table}
  write_json(folder / "diagnosis.json", {"cells": rows, "tables": tables})
  for part in filter(tables.get, parts):
    document.print_table(
      Table(
        name=part,
        title=f"Verdict and training, {part}",
        header=[*tables[part][0]],
        rows=[[*row.values()] for row in tables[part]],
        note="Each network counts twice, with SGD and with Adam. It trains if the best "
        "of three learning rates brings the running accuracy to "
        f"{100 * _TRAINS_ABOVE:.0f} % in two epochs.",
      )
    )


def _lines(path: pathlib.Path) -> list[str]:
  return path.read_text("utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
  _WORKDIR = program.define_workdir("cells.jsonl and diagnosis.json")
  _PARTS = flags.DEFINE_multi_enum("part", list(PARTS), PARTS, "Which cells to check.")
  _MAX_DEPTH = flags.DEFINE_integer(
    "max_depth", 1000, "The largest depth; less is for a quick look.", lower_bound=1
  )
  _FAMILIES = flags.DEFINE_multi_enum(
    "family",
    list(diagnosis_families.VARIANTS),
    list(diagnosis_families.VARIANTS),
    "Which families to check.",
  )
  program.run(
    lambda: main(_WORKDIR.value, _PARTS.value, _FAMILIES.value, _MAX_DEPTH.value)
  )
