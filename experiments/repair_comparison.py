"""Compares ways to make networks train that do not, by what they reach.

Residual networks without normalization are trained on digits and on a part of
Fashion-MNIST at a quarter of its resolution: as they are, with variables repaired by
`analysis.repair`, with LSUV (Mishkin & Matas, ICLR 2016), and with code changed to
SkipInit, Fixup or batch norm. Each searches its own learning rate, by the protocol of
the studies. The program keeps every finished run: the same command goes on from there.

Example:
  python -m experiments.repair_comparison --workdir=/tmp/repair
"""

import dataclasses
import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments import program
from skipinit_jax import analysis, data, document, export, models
from skipinit_jax.document import Table
from skipinit_jax.errors import unknown_name
from skipinit_jax.files import read_json, write_json
from skipinit_jax.studies import Outcome, SearchConfig, find_optimum, wanted_runs
from skipinit_jax.studies.formatting import format_accuracy, format_rate
from skipinit_jax.studies.search import summarize_rates
from skipinit_jax.training import (
  TrainConfig,
  make_init,
  make_mesh,
  make_optimizer,
  train,
)

Variables = Mapping[str, Any]
Prepare = Callable[[nn.Module, Variables, jax.Array], Variables]

_DATASETS = ("digits", "fashion_mnist_quarter_2048")
# Chance is 10 %.
_TRAINS_ABOVE = 0.2


def _search() -> SearchConfig:
  return SearchConfig(
    # Short runs at single rates can fail or succeed by chance.
    learning_rates=(2**-8, 2**-7, 2**-6, 2**-5, 2**-4),
    min_learning_rate=2**-10,
    max_learning_rate=2**-1,
    num_seeds=3,
    best_of=3,
  )


def lsuv(model: nn.Module, variables: Variables, images: jax.Array) -> Variables:
  """Layer-sequential unit-variance initialization (Mishkin & Matas, ICLR 2016).

  Their algorithm 1: kernels start orthonormal; then layer after layer, from the input
  on, the kernel is divided by the standard deviation of the layer's output on a batch,
  until its variance is within 0.1 of one, ten times at most.
  """
  calls: dict[tuple[str, ...], None] = {}

  def record(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, nn.Conv | nn.Dense):
      calls[context.module.path] = None
    return run(*args, **kwargs)

  @jax.jit
  def variances(params: Any) -> dict[tuple[str, ...], jax.Array]:
    with nn.intercept_methods(record):
      _, state = model.apply(
        {"params": params},
        images,
        train=True,
        capture_intermediates=lambda module, _: isinstance(module, nn.Conv | nn.Dense),
      )
    found = {}
    for path in calls:
      (output,) = _at(state["intermediates"], path)["__call__"]
      stacked = _at(params, path)["kernel"].ndim - (4 if output.ndim > 3 else 2)
      found[path] = output.reshape(*output.shape[:stacked], -1).var(-1)
    return found

  orthogonal = nn.initializers.orthogonal()
  params = jax.tree.map(np.array, variables["params"])
  by_path = jax.eval_shape(variances, params)
  # In the order of the calls.
  shapes = {path: by_path[path] for path in calls}
  keys = iter(jax.random.split(jax.random.key(0), sum(s.size for s in shapes.values())))
  for path, index in _layers(shapes):
    kernel = _at(params, path)["kernel"]
    kernel[index] = orthogonal(next(keys), kernel[index].shape)
  for path, index in _layers(shapes):
    for _ in range(10):
      variance = float(variances(params)[path][index])
      if abs(variance - 1) < 0.1:
        break
      _at(params, path)["kernel"][index] /= np.sqrt(variance)
  return {**variables, "params": params}


def _layers(shapes: Mapping[tuple[str, ...], Any]) -> Iterator[tuple[Any, Any]]:
  """Yields the layers in the order of the forward pass, with their place in a stack."""
  by_block: dict[Any, list[Any]] = {}
  for path, shape in shapes.items():
    by_block.setdefault((path[:-1] if shape.ndim else path), []).append(path)
  for paths in by_block.values():
    for index in np.ndindex(shapes[paths[0]].shape):
      yield from ((path, index if index else ...) for path in paths)


def _at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
  return functools.reduce(lambda node, name: node[name], path, tree)


def _repaired(to: analysis.Target) -> Prepare:
  return lambda model, variables, images: (
    analysis.repair(model, variables, images, to=to).variables
  )


WAYS: dict[str, tuple[str, Prepare | None]] = {
  "as it is": ("unnormalized", None),
  "repaired": ("unnormalized", _repaired("measured")),
  "repaired to zero": ("unnormalized", _repaired("zero")),
  "LSUV": ("unnormalized", lsuv),
  "SkipInit": ("skipinit", None),
  "Fixup": ("fixup", None),
  "batch norm": ("batch_norm", None),
}
"""Each way's method, and what it does to the initial variables; those of the first
four are of one network."""


@dataclasses.dataclass
class RepairConfig:
  """What is compared.

  Attributes:
    ways: which ways to train a network, as `WAYS` names them.
    residual_mlp_datasets: what fully connected networks are trained on.
    wide_resnet_datasets: what convolutional ones are.
    residual_mlp: how fully connected networks are trained.
    wide_resnet: how convolutional ones are.
    residual_mlp_search: the rates and seeds of each way to train the former.
    wide_resnet_search: likewise of the latter.
  """

  ways: tuple[str, ...] = tuple(WAYS)
  residual_mlp_datasets: tuple[str, ...] = _DATASETS
  wide_resnet_datasets: tuple[str, ...] = _DATASETS
  residual_mlp: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(
      model="residual_mlp",
      depth=50,
      width=48,
      layers_per_block=2,
      epochs=6,
      constant_epochs=4,
    )
  )
  wide_resnet: TrainConfig = dataclasses.field(
    default_factory=lambda: TrainConfig(depth=64, epochs=3, constant_epochs=2)
  )
  residual_mlp_search: SearchConfig = dataclasses.field(default_factory=_search)
  wide_resnet_search: SearchConfig = dataclasses.field(default_factory=_search)


def _train(config: TrainConfig, prepare: Prepare | None) -> float | None:
  """Returns the test accuracy of a run; None if it diverged."""
  with tempfile.TemporaryDirectory() as folder:
    if prepare is not None:
      weights = pathlib.Path(folder, "weights.safetensors")
      variables = models.unroll_variables(_prepared(config, prepare))
      export.save_safetensors(weights, variables)
      config = dataclasses.replace(config, init_from=str(weights))
    workdir = pathlib.Path(folder, "run")
    return train(config, workdir, show_progress=False).test_accuracy


def _prepared(config: TrainConfig, prepare: Prepare) -> Variables:
  """Returns a run's initial variables, as its way changes them by its first images."""
  dataset = config.load_dataset()
  assert isinstance(dataset, data.Dataset)
  model = config.make_model(dataset.num_classes)
  init, _ = make_init(
    model,
    functools.partial(make_optimizer, config, 1),
    dataset.image_shape,
    mesh=make_mesh(),
  )
  state = init(np.uint32(config.seed), np.float32(config.learning_rate))
  images = jnp.asarray(dataset.train.images[: config.batch_size])
  images = data.augmentation.normalize(images, dataset.mean, dataset.std)
  return prepare(model, {"params": state.params, **state.model_state}, images)


def compare(config: RepairConfig, path: pathlib.Path) -> dict[str, Any]:
  """Trains what is not yet trained; returns all runs, as they are in the file."""
  for way in config.ways:
    if way not in WAYS:
      raise unknown_name("way", way, WAYS)
  results: dict[str, Any] = {"config": dataclasses.asdict(config), "runs": []}
  if path.exists():
    results["runs"] = read_json(path)["runs"]
  trainings = [
    (dataclasses.replace(train, dataset=name), search)
    for train, search, names in (
      (config.residual_mlp, config.residual_mlp_search, config.residual_mlp_datasets),
      (config.wide_resnet, config.wide_resnet_search, config.wide_resnet_datasets),
    )
    for name in names
  ]
  for (cell, search), way in itertools.product(trainings, config.ways):
    method, prepare = WAYS[way]
    labels = {"dataset": cell.dataset, "network": cell.network_title, "way": way}
    while missing := _missing(results["runs"], labels, search):
      rate, seed = missing[0]
      run = dataclasses.replace(cell, method=method, learning_rate=rate, seed=seed)
      accuracy = _train(run, prepare)
      results["runs"].append(
        {**labels, "learning_rate": rate, "seed": seed, "test_accuracy": accuracy}
      )
      write_json(path, results)
      print(*results["runs"][-1].values(), flush=True)
  results["tables"] = {"accuracy": accuracy_rows(results["runs"])}
  write_json(path, results)
  return results


def _outcomes(
  runs: list[dict[str, Any]], labels: Mapping[str, str]
) -> dict[tuple[float, int], Outcome]:
  return {
    (run["learning_rate"], run["seed"]): Outcome(run["test_accuracy"], None)
    for run in runs
    if all(run[name] == value for name, value in labels.items())
  }


def _missing(
  runs: list[dict[str, Any]], labels: Mapping[str, str], search: SearchConfig
) -> list[tuple[float, int]]:
  outcomes = _outcomes(runs, labels)
  wanted = wanted_runs(search, outcomes, _TRAINS_ABOVE)
  return [run for run in wanted if run not in outcomes]


def accuracy_rows(runs: list[dict[str, Any]]) -> list[dict[str, str]]:
  """Returns test accuracies at the best rates, by network and way."""
  ways = [way for way in WAYS if any(run["way"] == way for run in runs)]
  return [
    {
      "network": f"{network}, {data.title(dataset)}",
      **{
        way: _accuracy(
          _outcomes(runs, {"dataset": dataset, "network": network, "way": way})
        )
        for way in ways
      },
    }
    for dataset, network in dict.fromkeys((r["dataset"], r["network"]) for r in runs)
  ]


def _accuracy(outcomes: dict[tuple[float, int], Outcome]) -> str:
  if not outcomes:
    return "-"
  num_seeds = len({seed for _, seed in outcomes})
  rates = summarize_rates(SearchConfig(best_of=num_seeds), outcomes)
  best = find_optimum(rates, "test_accuracy")
  if best is None:
    return "diverges"
  if best.value < _TRAINS_ABOVE:
    return f"does not train ({100 * best.value:.1f})"
  accuracy = format_accuracy(best.value, best.deviation)
  edge = "" if best.is_inside else "*"
  return f"{accuracy}, {format_rate(best.learning_rate)}{edge}"


def main(config: RepairConfig, workdir: str) -> None:
  """Runs the comparison and prints its table."""
  path = pathlib.Path(workdir, "repair.json")
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = compare(config, path)["tables"]["accuracy"]
  document.print_table(
    Table(
      name="accuracy",
      title="Networks that do not train as they are",
      header=[*rows[0]],
      rows=[[*row.values()] for row in rows],
      note="Test accuracy in %, its mean and deviation over seeds, and the best rate. "
      "*: the rate is at the edge of what was tried.",
    )
  )


if __name__ == "__main__":
  _WORKDIR = program.define_workdir("repair.json")
  _CONFIG = program.define_config({"full": RepairConfig}, default="full")
  program.run(lambda: main(_CONFIG.value, _WORKDIR.value))
