"""What both equivalences share: their data, networks, precisions and numbers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configs.equivalence import EquivalenceConfig
from skipinit_jax import data, document
from skipinit_jax.analysis import equivalence
from skipinit_jax.methods import Method
from skipinit_jax.models import ResidualMLP, WideResNet
from skipinit_jax.studies.names import model_name

PRECISIONS = ("float32", "float64")
# Equal to so many digits, half of those of float64, is equal but for rounding.
TOLERANCE = 1e-8
# No two different functions of these experiments come so close.
DIFFERENT = 1e-3
_NUM_CLASSES = 10
# Images on which two networks are compared, as functions.
_HELD_OUT = 64
# Steps that equivalence.json has of each curve, beside the first few.
_MOST_STEPS = 80


class Task(NamedTuple):
  """What all runs of an experiment see.

  Attributes:
    images: of each step's batch, float32 [steps, batch, ...].
    labels: of each step's batch, int32 [steps, batch].
    held_out: images of the test set, float32 [N, ...].
    epoch: steps of an epoch.
  """

  images: np.ndarray
  labels: np.ndarray
  held_out: np.ndarray
  epoch: int

  def batches(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images in a dtype, and labels."""
    return self.images.astype(dtype), self.labels


class Outcome(NamedTuple):
  """What an experiment found.

  Attributes:
    title: its name.
    lead: what it does.
    findings: its claims, checked.
    summary: the table to print.
    sections: its other tables and figures.
    numbers: for equivalence.json.
  """

  title: str
  lead: str
  findings: list[document.Finding]
  summary: document.Table
  sections: list[document.Section]
  numbers: dict[str, Any]


def load(config: EquivalenceConfig) -> Task:
  """Returns the batches of a configuration."""
  dataset = data.load("digits")
  size = dataset.train.num_examples
  epoch = data.in_memory.steps_per_epoch(size, config.batch_size)
  key = jax.random.fold_in(jax.random.key(config.seed), 1)
  orders = [
    np.asarray(data.in_memory.epoch_permutation(key, number, size))
    for number in range(-(-config.steps // epoch))
  ]
  rows = [order[: epoch * config.batch_size] for order in orders]
  batches = np.concatenate(rows).reshape(-1, config.batch_size)[: config.steps]

  def normalize(images: np.ndarray) -> np.ndarray:
    pixels = jnp.asarray(images)
    return np.asarray(data.augmentation.normalize(pixels, dataset.mean, dataset.std))

  return Task(
    normalize(dataset.train.images)[batches],
    dataset.train.labels[batches],
    normalize(dataset.test.images[:_HELD_OUT]),
    epoch,
  )


def make_network(
  config: EquivalenceConfig, method: Method, dtype: str
) -> equivalence.AnyPrecision:
  """Returns the network of a configuration in a dtype."""
  model = {"residual_mlp": ResidualMLP, "wide_resnet": WideResNet}[config.model]
  dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
  return equivalence.AnyPrecision(
    model(config.depth, config.width, _NUM_CLASSES, method, **dtypes)
  )


def initialize(config: EquivalenceConfig, method: Method, task: Task) -> Any:
  """Returns initial variables, the same numbers for both precisions."""
  network = make_network(config, method, "float32")
  key = jax.random.key(config.seed)
  init = jax.jit(lambda key: network.init(key, task.held_out, train=False))
  return jax.device_get(init(key))


def cast(tree: Any, dtype: str) -> Any:
  """Returns a tree of arrays in a dtype."""
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
  """Returns the mean cross-entropy of a batch."""
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def describe(config: EquivalenceConfig, method: Method) -> str:
  """Says in words what is trained."""
  return (
    f"{model_name(config.model)} {config.depth}-{config.width} ({method.title}) on "
    f"digits, {config.steps} steps of batches of {config.batch_size}, SGD with "
    f"momentum {config.momentum:g} and L2 {config.l2:g}"
  )


def thin(values: np.ndarray) -> list[float]:
  """Returns the first values and some of the others, with six digits."""
  last = len(values) - 1
  every = -(-len(values) // _MOST_STEPS)
  chosen = {*range(min(10, len(values))), *range(0, len(values), every), last}
  return [float(f"{values[step]:.6g}") for step in sorted(chosen)]


def first(condition: np.ndarray) -> int:
  """Returns the first step of which a condition is true, or the number of steps."""
  return int(np.argmax(condition)) if condition.any() else len(condition)


def same(difference: float, yardstick: float) -> bool | None:
  """Tells if a difference is rounding; None if rounding alone makes a large one."""
  if difference <= TOLERANCE:
    return True
  return None if yardstick > TOLERANCE else False
