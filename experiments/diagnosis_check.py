"""Checks the verdicts of `analysis.diagnose` against short trainings on digits.

Each cell is a network: a method, a depth and an initial alpha. It is diagnosed at
initialization, then trained for a few epochs at several learning rates. Cells whose
training the workdir holds already are only diagnosed again. The limits of
`analysis.diagnose` were chosen by cells of the part "tuned", and were final before any
cell of the part "judged" was trained: it has other depths, alphas and widths, and
deeper convolutional networks.

Example:
  python -m experiments.diagnosis_check --workdir=results/diagnosis
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import program
from skipinit_jax import analysis, data, document, methods
from skipinit_jax.files import read_json, write_json
from skipinit_jax.models import ResidualMLP, WideResNet

_WORKDIR = program.define_workdir("diagnosis.json and the report")

_BATCH_SIZE = 64
_EPOCHS = 4
_LEARNING_RATES = (2**-4, 2**-7, 2**-10)
_TRAINING = {
  "batch_size": _BATCH_SIZE,
  "epochs": _EPOCHS,
  "learning_rates": list(_LEARNING_RATES),
}
# Half way to perfect: chance is 10 %, and most that train reach 80 % or more.
_TRAINS_ABOVE = 0.5


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

  def make_model(self) -> ResidualMLP | WideResNet:
    """Returns the network; its alpha is set in the parameters.

    So the cells that differ only in alpha share their compiled programs.
    """
    if self.method == "halve":
      method = dataclasses.replace(methods.get("unnormalized"), sum_scale=0.5)
    else:
      method = methods.get(self.method)
    if self.model == "wide_resnet":
      return WideResNet(self.depth, self.width, 10, method)
    layers = self.layers_per_block
    return ResidualMLP(self.depth, self.width, 10, method, layers_per_block=layers)


def cells() -> Iterator[Cell]:
  """Yields the cells of both parts."""
  for depth in (16, 64, 256):
    for alpha in sorted({1.0, 0.5, 0.25, depth**-0.5, 0.0}):
      yield Cell("tuned", "skipinit_one", depth, alpha)
    for name in ("divide_by_sqrt2", "batch_norm", "batch_norm_divide_by_sqrt2"):
      yield Cell("tuned", name, depth)
  yield Cell("tuned", "divide_by_sqrt2", 128)
  yield Cell("tuned", "batch_norm_divide_by_sqrt2", 128)
  for depth in (16, 64):
    yield Cell("tuned", "halve", depth)

  for depth in (24, 96, 400):
    for alpha in (1.0, 0.35, 0.1):
      yield Cell("tuned", "skipinit_one", depth, alpha, width=64)
  two_layers = functools.partial(Cell, width=32, layers_per_block=2)
  for depth in (8, 32, 100):
    yield two_layers("tuned", "divide_by_sqrt2", depth)
    yield two_layers("tuned", "batch_norm_divide_by_sqrt2", depth)
    yield two_layers("tuned", "unnormalized", depth)
  yield two_layers("tuned", "batch_norm", 100)
  yield two_layers("tuned", "fixup", 100)
  yield two_layers("tuned", "halve", 8)
  yield two_layers("tuned", "halve", 32)
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
  yield two_layers("judged", "fixup", 300)
  yield two_layers("judged", "halve", 4)
  yield two_layers("judged", "halve", 20)
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


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Any, key: jax.Array, images: jax.Array) -> Any:
  return model.init(key, images, train=True)


@functools.partial(jax.jit, static_argnums=0)
def _signal(model: Any, variables: Any, images: jax.Array) -> analysis.Signal:
  return analysis.measure.signal(model, variables, images, train=True)


@functools.partial(jax.jit, static_argnums=0)
def _train(
  model: Any, variables: Any, rate: jax.Array, train: Any, test: Any
) -> jax.Array:
  """Returns the test accuracy after a few epochs of SGD with momentum."""
  params, model_state = variables["params"], dict(variables)
  del model_state["params"]
  optimizer = optax.sgd(1.0, momentum=0.9)

  def loss_of(params: Any, model_state: Any, batch: Any) -> tuple[jax.Array, Any]:
    images, labels = batch
    logits, model_state = model.apply(
      {"params": params, **model_state}, images, train=True, mutable=list(model_state)
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), model_state

  def step(state: Any, rows: jax.Array) -> tuple[Any, None]:
    params, model_state, opt_state = state
    batch = jax.tree.map(lambda x: x[rows], train)
    grads, model_state = jax.grad(loss_of, has_aux=True)(params, model_state, batch)
    grads = jax.tree.map(lambda grad: rate * grad, grads)
    updates, opt_state = optimizer.update(grads, opt_state)
    return (optax.apply_updates(params, updates), model_state, opt_state), None

  keys = jax.random.split(jax.random.key(1), _EPOCHS)
  orders = jax.vmap(lambda key: jax.random.permutation(key, len(train[1])))(keys)
  state = (params, model_state, optimizer.init(params))
  (params, model_state, _), _ = jax.lax.scan(
    step, state, orders.reshape(-1, _BATCH_SIZE)
  )
  logits = model.apply({"params": params, **model_state}, test[0], train=False)
  # NaN has a largest entry too: the first.
  right = (logits.argmax(-1) == test[1]) & jnp.isfinite(logits).all(-1)
  return right.mean()


def _set_alpha(variables: Any, alpha: float | None) -> Any:
  def change(path: Any, leaf: jax.Array) -> jax.Array:
    if alpha is None or "branch_scale" not in jax.tree_util.keystr(path):
      return leaf
    return jnp.full_like(leaf, alpha)

  return jax.tree_util.tree_map_with_path(change, variables)


def check(
  cell: Cell, train: Any, test: Any, accuracies: list[float] | None = None
) -> dict[str, Any]:
  """Diagnoses and trains one cell.

  Args:
    cell: the cell.
    train: images and labels.
    test: images and labels.
    accuracies: of an earlier training; None: train it.

  Returns:
    Plain values for `diagnosis.json`.
  """
  model, batch = cell.make_model(), train[0][:_BATCH_SIZE]
  variables = _set_alpha(_init(model, jax.random.key(0), batch), cell.alpha)
  signal = _signal(model, variables, batch)
  diagnosis = analysis.diagnose_signal(signal)
  if accuracies is None:
    accuracies = [
      float(_train(model, variables, jnp.float32(rate), train, test))
      for rate in _LEARNING_RATES
    ]
  return {
    **dataclasses.asdict(cell),
    "forward_growth": diagnosis.forward_growth,
    "gradient_growth": diagnosis.gradient_growth,
    "median_gradient_growth": float(np.median(signal.relative_gradient)),
    "cosine": diagnosis.cosine,
    "healthy": diagnosis.healthy,
    "verdict": diagnosis.text,
    "accuracies": accuracies,
    "test_accuracy": max(accuracies),
    "trains": max(accuracies) >= _TRAINS_ABOVE,
  }


def _read_accuracies(path: pathlib.Path) -> dict[Cell, list[float]]:
  """Returns the trainings of an earlier call with the same settings."""
  results = read_json(path) if path.exists() else {}
  if results.get("training") != _TRAINING:
    return {}
  names = [field.name for field in dataclasses.fields(Cell)]
  return {
    Cell(**{name: row[name] for name in names}): row["accuracies"]
    for row in results["cells"]
  }


def main() -> None:
  """Runs the program."""
  dataset = data.load("digits")
  train, test = (
    (
      data.augmentation.normalize(jnp.asarray(split.images), dataset.mean, dataset.std),
      jnp.asarray(split.labels),
    )
    for split in (dataset.train, dataset.test)
  )
  path = pathlib.Path(_WORKDIR.value, "diagnosis.json")
  path.parent.mkdir(parents=True, exist_ok=True)
  known = _read_accuracies(path)
  rows: list[dict[str, Any]] = []
  for cell in cells():
    row = check(cell, train, test, known.get(cell))
    rows.append(row)
    print(
      f"{_name(row)}: {'healthy' if row['healthy'] else 'faulty'}, "
      f"{'trains' if row['trains'] else 'does not train'} "
      f"({100 * row['test_accuracy']:.0f} %)",
      flush=True,
    )
    if cell not in known:
      # A program that is stopped goes on from here.
      write_json(path, {"training": _TRAINING, "cells": rows})
  write_json(path, {"training": _TRAINING, "cells": rows})
  page, *_ = document.write(_report(rows), path.parent)
  document.print_table(_confusion(rows))
  print(f"Report: {page}")


def _name(row: dict[str, Any]) -> str:
  if row["model"] == "wide_resnet":
    network = f"Wide-ResNet {row['depth']}-{row['width']}"
  else:
    layers = "" if row["layers_per_block"] == 1 else ", 2-layer branches"
    network = f"MLP {row['depth']}-{row['width']}{layers}"
  method = "divide by 2" if row["method"] == "halve" else row["method"]
  if row["alpha"] is not None:
    method = f"SkipInit, α = {row['alpha']:.3g}"
  return f"{network}, {method}"


def _confusion(rows: list[dict[str, Any]]) -> document.Table:
  def count(part: str, healthy: bool, trains: bool) -> str:
    found = [
      row
      for row in rows
      if (row["part"], row["healthy"], row["trains"]) == (part, healthy, trains)
    ]
    return str(len(found))

  return document.Table(
    name="confusion",
    title="Verdict and training",
    header=["cells", "verdict", "trains", "does not train"],
    rows=[
      [part, verdict, count(part, healthy, True), count(part, healthy, False)]
      for part in ("tuned", "judged")
      for verdict, healthy in (("healthy", True), ("faulty", False))
    ],
    note="The limits were chosen by tuned cells, and were final before any judged one "
    "was trained. A network trains if its test "
    f"accuracy at the best of {len(_LEARNING_RATES)} learning rates is at least "
    f"{100 * _TRAINS_ABOVE:.0f} % after {_EPOCHS} epochs.",
  )


def _cells_table(rows: list[dict[str, Any]], part: str) -> document.Table:
  body: list[list[str | document.Entry]] = []
  for row in rows:
    if row["part"] != part:
      continue
    agrees = row["healthy"] == row["trains"]
    verdict = "healthy" if row["healthy"] else "faulty"
    body.append(
      [
        _name(row),
        f"{row['forward_growth']:.2g}",
        f"{row['median_gradient_growth']:.2g}",
        f"{1 - row['cosine']:.2g}",
        document.Entry(verdict, "good" if agrees else "bad"),
        f"{100 * row['test_accuracy']:.1f}",
      ]
    )
  return document.Table(
    name=part,
    title=f"Cells that are {part}",
    header=[
      "network",
      "forward growth",
      "gradient, median block",
      "1 - cosine",
      "verdict",
      "test accuracy (%)",
    ],
    rows=body,
    note="Forward growth is of the second moment, over all blocks; the gradient's is "
    "over that behind the last block. A verdict in red disagrees with training.",
  )


def _agreement(rows: list[dict[str, Any]]) -> document.Table:
  body = []
  for part in ("judged", "tuned"):
    mine = [row for row in rows if row["part"] == part]
    wrong = [row for row in mine if row["healthy"] != row["trains"]]
    agree = f"{len(mine) - len(wrong)} of {len(mine)}"
    body.append([part, agree, "; ".join(map(_name, wrong)) or "none"])
  return document.Table(
    name="agreement",
    title="Cells in which the verdict agrees with training",
    header=["cells", "agree", "disagree"],
    rows=body,
  )


def _report(rows: list[dict[str, Any]]) -> document.Document:
  return document.Document(
    title="Does the diagnosis agree with training?",
    lead="Networks diagnosed at initialization, then trained on scikit-learn's 8x8 "
    f"digits for {_EPOCHS} epochs of batches of {_BATCH_SIZE}, by SGD with momentum "
    "0.9, one seed.",
    findings=[],
    sections=[
      document.Section("Agreement", "", [_confusion(rows), _agreement(rows)]),
      document.Section(
        "Cells", "", [_cells_table(rows, part) for part in ("tuned", "judged")]
      ),
    ],
    config={
      **_TRAINING,
      "forward_limit": analysis.FORWARD_LIMIT,
      "gradient_limit": analysis.GRADIENT_LIMIT,
      "distance_limit": analysis.DISTANCE_LIMIT,
    },
    versions={
      name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")
    },
    device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    command="python -m experiments.diagnosis_check --workdir=results/diagnosis",
  )


if __name__ == "__main__":
  program.run(main)
