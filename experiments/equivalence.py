"""Shows that trainings which look different are the same, and where that ends.

Two runs are compared as functions, by the largest difference of their logits of
held-out digits over the largest logit.

Divided parameters at a multiplied rate:
  python -m experiments.equivalence --workdir=/tmp/reparameterization

Batch norm with weight decay, and without it at an exponentially growing rate:
  python -m experiments.equivalence --workdir=/tmp/weight_decay --config=weight_decay

Reparameterization. Let w_t be the iterates of gradient descent with momentum on L(w)
at rate eta. The iterates on L(w / c), from c w_0 at rate c^2 eta, are c w_t: at c w the
gradient is 1 / c times that of L at w, so an update is c^2 / c times as large. L2 is
part of L: the coefficient of its gradient at c w is l2 / c^2.

Weight decay (Li & Arora, ICLR 2020, arXiv:1910.07454). Let L(k w) = L(w) for any
k > 0, as in batch-normalized networks, so that grad L(k w) = grad L(w) / k. With
momentum gamma, a constant rate eta and weight decay lambda,

    w_{t+1} = (1 + gamma - eta lambda) w_t - gamma w_{t-1} - eta grad L(w_t).

Without decay, at the rate eta rho^(-2t-1) in step t, with the same momentum,

    u_{t+1} = u_t + gamma rho^-2 (u_t - u_{t-1}) - eta rho^(-2t-1) grad L(u_t).

With u_t = rho^-t w_t, and times rho^(t+1), the second equation is the first one if
rho + gamma / rho = 1 + gamma - eta lambda. The first step agrees too if the velocity,
a sum of gradients, is -(1 - rho) / (eta rho) w_0 before it. So both runs are the same
function at every step, and the rate grows without bound.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import program
from skipinit_jax import data, methods
from skipinit_jax.analysis.figures import Panel, line_figure
from skipinit_jax.document import drawing
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.fields import check_types, unusual
from skipinit_jax.files import write_file, write_json
from skipinit_jax.models import ResidualMLP
from skipinit_jax.studies.checks import check_lists
from skipinit_jax.training.size import check_network

# A run's final loss is the mean of so many.
_LAST_STEPS = 20


@dataclasses.dataclass
class EquivalenceConfig:
  """A residual MLP on digits, and how it is trained.

  Attributes:
    experiment: reparameterization (of SkipInit) or weight_decay (of batch norm).
    depth: residual blocks.
    width: features of every layer.
    batch_size: training images of a step.
    steps: steps of each run.
    learning_rate: constant rate of the original run.
    momentum: heavy-ball momentum.
    l2: coefficient of the L2 penalty l2/2 |w|^2, added to the gradient.
    constants: what parameters are multiplied by, for reparameterization only.
    seed: seed of the initialization and of the batches.
  """

  experiment: str = "reparameterization"
  depth: int = 16
  width: int = 64
  batch_size: int = 64
  steps: int = 200
  learning_rate: float = 2**-4
  momentum: float = 0.9
  l2: float = 5e-4
  constants: tuple[float, ...] = (0.25, 4.0, 3.0, 10.0)
  seed: int = 0

  def validate(self) -> None:
    """Raises a UsageError for a value that is not allowed, or without effect."""
    check_types(self)
    check_lists(self)
    if self.experiment not in EXPERIMENTS:
      raise unknown_name("experiment", self.experiment, EXPERIMENTS)
    if self.experiment != "reparameterization" and "constants" in dict(unusual(self)):
      raise UsageError(
        f"constants is {self.constants}: it is for reparameterization, so it must be "
        "left out."
      )
    limits = {
      # Batch norm makes 1 and -1 of any two images.
      "batch_size": (3, 2**31),
      "steps": (_LAST_STEPS, 2**31),
      "learning_rate": (2**-30, 2**30),
      "momentum": (0, 1),
      "l2": (0, 2**30),
      "constants": (2**-16, 2**16),
      "seed": (0, 2**32 - 1),
    }
    for name, (low, high) in limits.items():
      for value in np.atleast_1d(getattr(self, name)):
        if not low <= value <= high:
          raise UsageError(f"{name} has {value}: it must be in [{low}, {high}].")


class Run(NamedTuple):
  """Gradient descent on L(w / c), from c w_0.

  Attributes:
    rates: the learning rate of each step, [steps].
    l2: coefficient of the penalty l2 / 2 |w / c|^2.
    velocity: the velocity before the first step, over c w_0.
    c: the constant.
  """

  rates: np.ndarray
  l2: float
  velocity: float = 0.0
  c: float = 1.0


class History(NamedTuple):
  """A run's loss, and its logits of held-out images, before each step."""

  loss: np.ndarray
  logits: np.ndarray

  def difference(self, original: "History") -> np.ndarray:
    """Returns the largest difference of the logits over the largest logit, [steps]."""
    with np.errstate(invalid="ignore"):
      difference = np.abs(self.logits - original.logits).max((1, 2))
      return np.nan_to_num(difference / np.abs(original.logits).max((1, 2)), nan=np.inf)


def decay_root(learning_rate: float, momentum: float, l2: float) -> float:
  """Returns Li & Arora's rho, the larger root of what the module derives.

  Raises:
    UsageError: the roots are not real and different, so that no growth is equivalent.
  """
  limit, decay = (1 - math.sqrt(momentum)) ** 2, learning_rate * l2
  if decay >= limit:
    raise UsageError(
      f"l2 is {l2:g}: with learning_rate {learning_rate:g} and momentum {momentum:g} a "
      f"growing rate is equivalent to it only below {limit / learning_rate:.3g}."
    )
  # The discriminant as a product keeps its digits where the two roots are close.
  discriminant = (limit - decay) * ((1 + math.sqrt(momentum)) ** 2 - decay)
  return (1 + momentum - decay + math.sqrt(discriminant)) / 2


def train(
  config: EquivalenceConfig, method: methods.Method, dtype: str, runs: Mapping[str, Run]
) -> dict[str, History]:
  """Trains one network by several runs, which one compiled program takes in turn.

  With a normalizer, a run's settings are those of the scale-invariant parameters; the
  others are trained as the configuration says.
  """
  dataset = data.load("digits")
  size = dataset.train.num_examples
  data.in_memory.steps_per_epoch(size, config.batch_size)  # Checks the batch size.
  rng = np.random.default_rng(config.seed)
  orders = np.stack([rng.permutation(size) for _ in range(config.steps)])
  original = Run(np.full(config.steps, config.learning_rate), config.l2)

  def is_changed(path: Any, _: jax.Array) -> bool:
    # Normalizers stand before each activation and the classifier, and see a sum of
    # what the kernels make: these may be scaled, all by one factor.
    name = jax.tree_util.keystr(path)
    return method.normalizer is None or ("kernel" in name and "classifier" not in name)

  def apply(params: Any, state: Any, images: jax.Array) -> tuple[jax.Array, Any]:
    variables = {"params": params, **state}
    return model.apply(variables, images, train=True, mutable=[*state])

  @jax.jit
  def train_run(params: Any, state: Any, run: Run) -> Any:
    changed = jax.tree_util.tree_map_with_path(is_changed, params)

    def setting(field: str) -> Any:
      return jax.tree.map(lambda use: getattr(run if use else original, field), changed)

    def loss(params: Any, state: Any, rows: jax.Array) -> tuple[jax.Array, Any]:
      params = jax.tree.map(lambda w: w / run.c, params)
      logits, state = apply(params, state, images[rows])
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
      return losses.mean(), state

    def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
      (params, velocity, state), (rows, rates) = carry, inputs
      scaled = jax.tree.map(lambda w: w / run.c, params)
      logits, _ = apply(scaled, state, held_out)
      differentiate = jax.value_and_grad(loss, has_aux=True)
      (value, state), grads = differentiate(params, state, rows)
      velocity = jax.tree.map(
        lambda v, grad, w, l2: config.momentum * v + (grad + l2 / run.c**2 * w),
        *(velocity, grads, params, setting("l2")),
      )
      params = jax.tree.map(lambda w, v, rate: w - rate * v, params, velocity, rates)
      return (params, velocity, state), (value, logits)

    params = jax.tree.map(lambda w: run.c * w, params)
    velocity = jax.tree.map(jnp.multiply, setting("velocity"), params)
    batches = orders[:, : config.batch_size], setting("rates")
    return jax.lax.scan(step, (params, velocity, state), batches)[1]

  # Growing rates leave the range of float32.
  with jax.enable_x64(dtype == "float64"), np.errstate(over="ignore"):
    sizes = config.depth, config.width, dataset.num_classes
    model = ResidualMLP(*sizes, method, dtype=dtype, param_dtype=dtype)
    check_network(model, dataset.image_shape, jnp.dtype(dtype).itemsize)
    images, held_out = (
      data.augmentation.normalize(jnp.asarray(pixels), dataset.mean, dataset.std)
      for pixels in (dataset.train.images, dataset.test.images[:64])
    )
    # Both precisions start from the same numbers.
    init = jax.jit(functools.partial(ResidualMLP(*sizes, method).init, train=False))
    state = init(jax.random.key(config.seed), held_out)
    images, held_out, state = jax.tree.map(
      lambda leaf: leaf.astype(dtype), (images, held_out, state)
    )
    labels, params = jnp.asarray(dataset.train.labels), state.pop("params")
    return {
      name: History(*jax.device_get(train_run(params, state, run)))
      for name, run in runs.items()
    }


def reparameterization(config: EquivalenceConfig) -> tuple[dict[str, Any], list[Panel]]:
  """Trains on L(w / c) from c w_0 at rate c^2 eta, beside L(w) from w_0 at rate eta."""
  eta, method = config.learning_rate, methods.get("skipinit")
  rates = eta * 2.0 ** np.arange(-6, 5)
  constants = {f"c = {c:g}": c for c in (1.0, *config.constants)}

  def run(c: float, rate: float) -> Run:
    return Run(np.full(config.steps, rate), config.l2, c=c)

  runs = {name: run(c, c**2 * eta) for name, c in constants.items()}
  runs["rate cη"] = run(config.constants[-1], config.constants[-1] * eta)
  search = {f"{n}, {r}": run(c, c**2 * r) for n, c in constants.items() for r in rates}
  double = train(config, method, "float64", runs)
  single = train(config, method, "float32", runs | search)
  if not np.isfinite(single["c = 1"].loss).all():
    raise UsageError(f"learning_rate is {eta:g}: the original run diverges.")
  final = {name: each.loss[-_LAST_STEPS:].mean() for name, each in single.items()}
  losses = {n: np.array([final[f"{n}, {r}"] for r in rates], float) for n in constants}
  own = {name: (c**2 * rates, losses[name]) for name, c in constants.items()}
  shared = {name: (rates, losses[name]) for name in constants}
  numbers = {
    "largest_difference": {
      f"{name}, {dtype}": histories[name].difference(histories["c = 1"]).max()
      for dtype, histories in (("float64", double), ("float32", single))
      for name in runs
    },
    "final_loss_by_rate_over_c_squared": {
      name: dict(zip(rates, loss, strict=True)) for name, loss in losses.items()
    },
  }
  return numbers, [
    Panel("training loss by learning rate", own, log_x=True),
    Panel("training loss by learning rate / c²", shared, log_x=True),
  ]


def weight_decay(config: EquivalenceConfig) -> tuple[dict[str, Any], list[Panel]]:
  """Trains with weight decay, and without it at Li & Arora's growing rate."""
  eta, steps = config.learning_rate, np.arange(config.steps)
  rho = decay_root(eta, config.momentum, config.l2)

  def growing(rho: float, velocity: float) -> Run:
    with np.errstate(over="ignore"):
      return Run(eta * rho ** -(2.0 * steps + 1), 0.0, velocity)

  def differences(dtype: str, epsilon: float, **runs: Run) -> dict[str, np.ndarray]:
    normalizer = functools.partial(methods.batch_normalizer, epsilon=epsilon)
    method = dataclasses.replace(methods.get("batch_norm"), normalizer=normalizer)
    done = train(config, method, dtype, {"decay": decay, **runs})
    return {name: done[name].difference(done["decay"]) for name in runs}

  decay = Run(np.full(config.steps, eta), config.l2)
  growth = growing(rho, -(1 - rho) / (eta * rho))
  controls = {
    "constant rate": decay._replace(l2=0.0),
    "growth as without momentum": growing(1 - eta * config.l2, 0.0),
    "no initial velocity": growing(rho, 0.0),
  }
  # So small an epsilon keeps 0 / 0 away, and does nothing to other variances.
  others = differences("float64", 1e-30, growth=growth, **controls)
  single = differences("float32", 1e-30, growth=growth)["growth"]
  same = {
    "float64": others.pop("growth"),
    "float32": single,
    "float64, ε = 1e-5": differences("float64", 1e-5, growth=growth)["growth"],
  }
  numbers = {
    "rho": rho,
    "largest_difference": {name: each.max() for name, each in (same | others).items()},
    # From the first step on.
    "steps_below_a_tenth_in_float32": np.logical_and.accumulate(single < 0.1).sum(),
    "finite_steps_in_float32": np.logical_and.accumulate(np.isfinite(single)).sum(),
  }
  return numbers, [
    Panel(title, {name: (steps, each) for name, each in lines.items()}, log_y=log_y)
    for title, lines, log_y in (
      ("difference at Li & Arora's growing rate", same, True),
      ("difference of controls, float64", others, False),
    )
  ]


# Each returns numbers by name and the panels of a figure, whose name and horizontal
# axis stand behind it.
EXPERIMENTS = {
  "reparameterization": (reparameterization, "rates", "learning rate"),
  "weight_decay": (weight_decay, "functions", "step"),
}
CONFIGS: dict[str, Callable[[], EquivalenceConfig]] = {
  "reparameterization": EquivalenceConfig,
  "weight_decay": functools.partial(
    EquivalenceConfig, "weight_decay", steps=1200, learning_rate=2**-3, l2=0.02
  ),
}


def main(config: EquivalenceConfig, workdir: str) -> None:
  """Runs an experiment, prints its numbers, and writes them and the figure."""
  config.validate()
  run, name, x_label = EXPERIMENTS[config.experiment]
  numbers, panels = run(config)
  path = pathlib.Path(workdir, "equivalence.json")
  path.parent.mkdir(parents=True, exist_ok=True)
  write_file(path.with_name(f"{name}.png"), drawing.image(line_figure(panels, x_label)))
  write_json(path, {"config": dataclasses.asdict(config), **numbers})
  print(path.read_text())


if __name__ == "__main__":
  _WORKDIR = program.define_workdir("equivalence.json and the figure")
  _CONFIG = program.define_config(CONFIGS, default="reparameterization")
  program.run(lambda: main(_CONFIG.value, _WORKDIR.value))
