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
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments import program
from skipinit_jax import analysis, data, document
from skipinit_jax.compilation import compiler_options
from skipinit_jax.data import in_memory
from skipinit_jax.document import Entry, Table
from skipinit_jax.errors import unknown_name
from skipinit_jax.files import read_json, write_json
from skipinit_jax.studies import Outcome, SearchConfig, find_optimum, wanted_runs
from skipinit_jax.studies.formatting import format_accuracy, format_rate
from skipinit_jax.studies.search import summarize_rates
from skipinit_jax.training import TrainConfig, make_optimizer

Variables = Mapping[str, Any]

_FASHION = "fashion_mnist_7x7"
_FASHION_TRAIN, _FASHION_TEST = 2048, 1000
_TITLES = {"digits": "digits", _FASHION: "Fashion-MNIST"}
# Chance is 10 %.
_TRAINS_ABOVE = 0.2


def load(name: str) -> data.Dataset:
  """Loads digits, or a part of Fashion-MNIST with images of 7x7."""
  if name != _FASHION:
    return data.load(name)
  whole = data.load("fashion_mnist")

  def small(split: data.Split, count: int) -> data.Split:
    images = split.images[:count].reshape(count, 7, 4, 7, 4, 1).mean((2, 4))
    return data.Split(images.round().astype(np.uint8), split.labels[:count])

  train, test = small(whole.train, _FASHION_TRAIN), small(whole.test, _FASHION_TEST)
  return data.Dataset(_FASHION, whole.num_classes, train, test)


@dataclasses.dataclass
class RepairConfig:
  """What is compared.

  Attributes:
    ways: which ways to train a network, as `WAYS` names them.
    residual_mlp_datasets: what fully connected networks are trained on; see `load`.
    wide_resnet_datasets: what convolutional ones are.
    residual_mlp: how fully connected networks are trained.
    wide_resnet: how convolutional ones are.
    residual_mlp_search: the rates and seeds of each way to train the former.
    wide_resnet_search: likewise of the latter.
  """

  ways: tuple[str, ...] = (
    "as it is",
    "repaired",
    "repaired to zero",
    "LSUV",
    "SkipInit",
    "Fixup",
    "batch norm",
  )
  residual_mlp_datasets: tuple[str, ...] = ("digits", _FASHION)
  wide_resnet_datasets: tuple[str, ...] = ("digits", _FASHION)
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
  residual_mlp_search: SearchConfig = dataclasses.field(
    default_factory=lambda: _search(num_seeds=3)
  )
  wide_resnet_search: SearchConfig = dataclasses.field(
    default_factory=lambda: _search(num_seeds=2)
  )


def _search(num_seeds: int) -> SearchConfig:
  return SearchConfig(
    learning_rates=(2**-6, 2**-5),
    min_learning_rate=2**-10,
    max_learning_rate=2**-1,
    num_seeds=num_seeds,
    best_of=num_seeds,
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


def _repaired(to: analysis.Target) -> Callable[..., Variables]:
  return lambda model, variables, images: (
    analysis.repair(model, variables, images, to=to).variables
  )


def _as_it_is(model: nn.Module, variables: Variables, images: jax.Array) -> Variables:
  return variables


WAYS: dict[str, tuple[str, Callable[..., Variables]]] = {
  "as it is": ("unnormalized", _as_it_is),
  "repaired": ("unnormalized", _repaired("measured")),
  "repaired to zero": ("unnormalized", _repaired("zero")),
  "LSUV": ("unnormalized", lsuv),
  "SkipInit": ("skipinit", _as_it_is),
  "Fixup": ("fixup", _as_it_is),
  "batch norm": ("batch_norm", _as_it_is),
}
"""Each way's method, and what it does to the initial variables; those of the first
four are of one network."""


class Cell:
  """One network on one data set, trained in one way."""

  def __init__(self, config: TrainConfig, dataset: data.Dataset, way: str) -> None:
    method, self._prepare = WAYS[way]
    self.config = dataclasses.replace(config, method=method)
    self._model = self.config.make_model(dataset.num_classes)
    self._train, self._test = (
      in_memory.DeviceSplit(jnp.asarray(split.images), jnp.asarray(split.labels))
      for split in (dataset.train, dataset.test)
    )
    self._normalize = functools.partial(
      data.augmentation.normalize, mean=dataset.mean, std=dataset.std
    )
    self._run = jax.jit(self._train_run, compiler_options=compiler_options())
    self._starts: dict[int, Variables] = {}

  def run(self, learning_rate: float, seed: int) -> float | None:
    """Returns the test accuracy of a run; None if it diverged."""
    if seed not in self._starts:
      images = self._normalize(self._train.images[: self.config.batch_size])
      init = jax.jit(functools.partial(self._model.init, train=False))
      variables = init(jax.random.key(seed), images)
      self._starts[seed] = self._prepare(self._model, variables, images)
    key = jax.random.key(seed + 1000)
    is_finite, accuracy = self._run(self._starts[seed], learning_rate, key)
    return float(accuracy) if is_finite else None

  def _train_run(
    self, variables: Variables, learning_rate: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    config, split = self.config, self._train
    per_epoch = len(split.labels) // config.batch_size
    optimizer = make_optimizer(config, per_epoch, learning_rate)
    state = {name: value for name, value in variables.items() if name != "params"}

    def loss(params: Any, state: Any, images: Any, labels: Any) -> tuple[Any, Any]:
      logits, state = self._model.apply(
        {"params": params, **state}, images, train=True, mutable=[*state]
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean(), state

    def step(carry: Any) -> Any:
      index, params, state, opt_state, _ = carry
      order = in_memory.epoch_permutation(key, index // per_epoch, len(split.labels))
      images, labels = in_memory.train_batch(
        split, order, index % per_epoch, config.batch_size
      )
      (value, state), grads = jax.value_and_grad(loss, has_aux=True)(
        params, state, self._normalize(images), labels
      )
      updates, opt_state = optimizer.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      return index + 1, params, state, opt_state, jnp.isfinite(value)

    params = variables["params"]
    begin = jnp.int32(0), params, state, optimizer.init(params), jnp.bool_(True)
    _, params, state, _, is_finite = jax.lax.while_loop(
      lambda carry: (carry[0] < per_epoch * config.epochs) & carry[-1], step, begin
    )
    logits: Any = self._model.apply(
      {"params": params, **state}, self._normalize(self._test.images), train=False
    )
    is_finite &= jnp.isfinite(logits).all()
    return is_finite, (logits.argmax(-1) == self._test.labels).mean()


def compare(config: RepairConfig, path: pathlib.Path) -> dict[str, Any]:
  """Trains what is not yet trained; returns all runs, as they are in the file."""
  for kind, names, known in (
    ("dataset", config.residual_mlp_datasets + config.wide_resnet_datasets, _TITLES),
    ("way", config.ways, WAYS),
  ):
    for name in names:
      if name not in known:
        raise unknown_name(kind, name, known)
  results: dict[str, Any] = {"config": dataclasses.asdict(config), "runs": []}
  if path.exists():
    results["runs"] = read_json(path)["runs"]
  trainings = [
    (config.residual_mlp, config.residual_mlp_search, name)
    for name in config.residual_mlp_datasets
  ] + [
    (config.wide_resnet, config.wide_resnet_search, name)
    for name in config.wide_resnet_datasets
  ]
  for (train, search, name), way in itertools.product(trainings, config.ways):
    labels = {"dataset": name, "network": train.network_title, "way": way}
    cell = None
    while missing := _missing(results["runs"], labels, search):
      cell = cell or Cell(train, load(name), way)
      rate, seed = missing[0]
      accuracy = cell.run(rate, seed)
      run = {"learning_rate": rate, "seed": seed, "test_accuracy": accuracy}
      results["runs"].append(labels | run)
      write_json(path, results)
      print(*labels.values(), *run.values(), flush=True)
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


def accuracy_table(results: Mapping[str, Any]) -> Table:
  """Returns test accuracies at the best rates, by network and way."""
  runs = results["runs"]
  ways = [way for way in WAYS if any(run["way"] == way for run in runs)]
  rows = []
  for dataset, network in dict.fromkeys((r["dataset"], r["network"]) for r in runs):
    row: list[Entry | str] = [f"{network}, {_TITLES[dataset]}"]
    for way in ways:
      labels = {"dataset": dataset, "network": network, "way": way}
      outcomes = _outcomes(runs, labels)
      if not outcomes:
        row.append("-")
        continue
      num_seeds = len({seed for _, seed in outcomes})
      rates = summarize_rates(SearchConfig(best_of=num_seeds), outcomes)
      best = find_optimum(rates, "test_accuracy")
      if best is None:
        row.append("diverges")
      elif best.value < _TRAINS_ABOVE:
        row.append(f"does not train ({100 * best.value:.1f})")
      else:
        accuracy = format_accuracy(best.value, best.deviation)
        edge = "" if best.is_inside else "*"
        row.append(f"{accuracy}, {format_rate(best.learning_rate)}{edge}")
    rows.append(row)
  return Table(
    name="accuracy",
    title="Networks that do not train as they are",
    header=["network", *ways],
    rows=rows,
    note="Test accuracy in %, its mean and deviation over seeds, and the best rate. *: "
    "the rate is at the edge of what was tried.",
  )


def main(config: RepairConfig, workdir: str) -> None:
  """Runs the comparison and prints its table."""
  path = pathlib.Path(workdir, "repair.json")
  path.parent.mkdir(parents=True, exist_ok=True)
  document.print_table(accuracy_table(compare(config, path)))


if __name__ == "__main__":
  _WORKDIR = program.define_workdir("repair.json")
  _CONFIG = program.define_config({"full": RepairConfig}, default="full")
  program.run(lambda: main(_CONFIG.value, _WORKDIR.value))
