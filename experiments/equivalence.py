"""Shows that trainings which look different are the same, and where that ends.

Divided parameters at a multiplied rate:
  python -m experiments.equivalence --workdir=/tmp/reparameterization

Batch norm with weight decay, and without it at an exponentially growing rate:
  python -m experiments.equivalence --workdir=/tmp/weight_decay --config=weight_decay
"""

import dataclasses
import functools
import importlib.metadata
import math
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import program
from experiments.configs.equivalence import CONFIGS, EquivalenceConfig
from skipinit_jax import data, methods
from skipinit_jax.analysis import equivalence, figures
from skipinit_jax.errors import UsageError
from skipinit_jax.methods import Method
from skipinit_jax.models import ResidualMLP, WideResNet
from skipinit_jax.studies import document
from skipinit_jax.studies.names import model_name
from skipinit_jax.training.metrics import write_json

_WORKDIR = program.define_workdir("equivalence.json, the figures, tables and report")
_CONFIG = program.define_config(CONFIGS, default="reparameterization")
_PRECISIONS = ("float32", "float64")
_NUM_CLASSES = 10
# Equal to so many digits, half of those of float64, is equal but for rounding.
_TOLERANCE = 1e-8
# No two different functions of these experiments come so close.
_DIFFERENT = 1e-3
# Learning rates of the search for the largest stable one, over the configured rate.
_RATE_FACTORS = [2.0**exponent for exponent in range(-6, 5)]
# Images on which two networks are compared, as functions.
_HELD_OUT = 64
# Does nothing to variances that float32 can represent, but keeps 0 / 0 away.
_NO_EPSILON = 1e-30
# Relative distance between norms that says that two runs have parted.
_NORM_TOLERANCE = 0.1
_CONTROLS = {
  "constant": "constant rate",
  "no_momentum": "growth as without momentum",
  "no_velocity": "no initial velocity",
}
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


def main() -> None:
  """Runs the program."""
  config, workdir = _CONFIG.value, _WORKDIR.value
  outcome = run(config)
  page, *_ = document.write(_report(config, outcome), workdir)
  write_json(
    pathlib.Path(workdir, "equivalence.json"),
    {"config": dataclasses.asdict(config), **outcome.numbers},
  )
  document.print_table(outcome.summary)
  document.print_findings(outcome.findings)
  program.print_report(page)


def run(config: EquivalenceConfig) -> Outcome:
  """Runs the experiment of a configuration.

  Args:
    config: the experiment and its network.

  Returns:
    What it found.

  Raises:
    UsageError: a field's value is not allowed.
  """
  config.validate()
  # Both precisions then train the same numbers, and rho belongs to them.
  learning_rate, momentum, l2 = (
    float(np.float32(value))
    for value in (config.learning_rate, config.momentum, config.l2)
  )
  config = dataclasses.replace(
    config, learning_rate=learning_rate, momentum=momentum, l2=l2
  )
  experiments: dict[str, Callable[[EquivalenceConfig], Outcome]] = {
    "reparameterization": run_reparameterization,
    "weight_decay": run_weight_decay,
  }
  return experiments[config.experiment](config)


def _load(config: EquivalenceConfig) -> Task:
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


def _make_network(
  config: EquivalenceConfig, method: Method, dtype: str
) -> equivalence.AnyPrecision:
  model = {"residual_mlp": ResidualMLP, "wide_resnet": WideResNet}[config.model]
  dtypes = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
  return equivalence.AnyPrecision(
    model(config.depth, config.width, _NUM_CLASSES, method, **dtypes)
  )


def _init(config: EquivalenceConfig, method: Method, task: Task) -> Any:
  """Returns initial variables, the same numbers for both precisions."""
  network = _make_network(config, method, "float32")
  key = jax.random.key(config.seed)
  init = jax.jit(lambda key: network.init(key, task.held_out, train=False))
  return jax.device_get(init(key))


def _cast(tree: Any, dtype: str) -> Any:
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def _cross_entropy(logits: Any, labels: jax.Array) -> jax.Array:
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _describe(config: EquivalenceConfig, method: Method) -> str:
  return (
    f"{model_name(config.model)} {config.depth}-{config.width} ({method.title}) on "
    f"digits, {config.steps} steps of batches of {config.batch_size}, SGD with "
    f"momentum {config.momentum:g} and L2 {config.l2:g}"
  )


def _thin(values: np.ndarray) -> list[float]:
  """Returns the first values and some of the others, with six digits."""
  last = len(values) - 1
  every = -(-len(values) // _MOST_STEPS)
  chosen = {*range(min(10, len(values))), *range(0, len(values), every), last}
  return [float(f"{values[step]:.6g}") for step in sorted(chosen)]


def _first(condition: np.ndarray) -> int:
  """Returns the first step of which a condition is true, or the number of steps."""
  return int(np.argmax(condition)) if condition.any() else len(condition)


def _same(difference: float, yardstick: float) -> bool | None:
  """Tells if a difference is rounding; None if rounding alone makes a large one."""
  if difference <= _TOLERANCE:
    return True
  return None if yardstick > _TOLERANCE else False


class Comparison(NamedTuple):
  """Reparameterized runs beside the original.

  Attributes:
    rate: the original's learning rate.
    dtype: the precision.
    runs: what all runs did; the first is the original.
  """

  rate: float
  dtype: str
  runs: equivalence.Trajectories

  @property
  def title(self) -> str:
    """Names precision and rate."""
    return f"{self.dtype}, rate {self.rate:g}"

  def farthest(self, *indices: int) -> float:
    """Returns the largest distance of some runs while the original is finite."""
    return float(self.runs.while_finite().distance[:, indices].max(initial=0))


def run_reparameterization(config: EquivalenceConfig) -> Outcome:
  """Trains on L(w / c) from c w_0 at rate c^2 eta, beside L(w) from w_0 at rate eta.

  Args:
    config: a valid configuration.

  Returns:
    What it found.
  """
  method = methods.get("skipinit")
  networks = {dtype: _make_network(config, method, dtype) for dtype in _PRECISIONS}
  task = _load(config)
  initial = _init(config, method, task)["params"]
  constants = [1.0, *map(float, config.constants)]
  make = equivalence.Reparameterization

  def train(
    dtype: str, runs: Callable[[Any], list[equivalence.Reparameterization]]
  ) -> equivalence.Trajectories:
    def loss(params: Any, batch: Any) -> jax.Array:
      images, labels = batch
      logits = networks[dtype].apply({"params": params}, images, train=True)
      return _cross_entropy(logits, labels)

    with jax.enable_x64(dtype == "float64"):
      return equivalence.trajectories(
        loss,
        runs(_cast(initial, dtype)),
        task.batches(dtype),
        momentum=config.momentum,
        l2=config.l2,
      )

  def compare(rate: float, dtype: str) -> Comparison:
    last = constants[-1]
    runs = train(
      dtype,
      lambda params: [
        *(make(params, c, c**2 * rate) for c in constants),
        make(equivalence.nudge(params), 1.0, rate),
        make(params, last, last * rate),
      ],
    )
    return Comparison(rate, dtype, runs)

  labels = [f"c = {c:g}" for c in constants]
  labels += ["c = 1, nudged", f"c = {constants[-1]:g}, rate cη"]
  comparisons = [compare(config.learning_rate, dtype) for dtype in _PRECISIONS]
  finite = min(len(each.runs.while_finite().loss) for each in comparisons)
  if finite < config.steps:
    raise UsageError(
      f"learning_rate is {config.learning_rate:g}: the original run diverges in step "
      f"{finite + 1} of {config.steps}."
    )
  rates = [config.learning_rate * factor for factor in _RATE_FACTORS]
  search = train(
    "float32",
    lambda params: [make(params, c, c**2 * rate) for c in constants for rate in rates],
  )
  losses = search.loss[-task.epoch :].mean(0).reshape(len(constants), len(rates))
  final = dict(zip(constants, losses, strict=True))
  stable = _stable_rates(rates, final)
  if stable[1.0] in rates[:-1]:
    unstable = rates[rates.index(stable[1.0]) + 1]
    comparisons += [compare(unstable, dtype) for dtype in _PRECISIONS]

  summary = _distance_table(comparisons, labels)
  return Outcome(
    title="Reparameterization: divided parameters at a multiplied rate",
    lead=f"{_describe(config, method)}. L(w) from w₀ at rate η, and L(w / c) from c w₀ "
    "at rate c²η, are the same trajectory: w' = c w.",
    findings=[
      *_trajectory_findings(constants, labels, comparisons),
      _stable_rate_finding(rates, final),
    ],
    summary=summary,
    sections=[
      document.Section(
        "Trajectories", "", [summary, *_distance_figures(comparisons, labels)]
      ),
      document.Section("Learning rates", "", [_rate_figure(rates, final)]),
    ],
    numbers={
      "steps": _thin(np.arange(1, config.steps + 1)),
      "trajectories": {
        each.title: {
          label: {
            "loss": _thin(each.runs.loss[:, index]),
            "distance": _thin(each.runs.distance[:, index]),
          }
          for index, label in enumerate(labels)
        }
        for each in comparisons
      },
      "final_loss": {
        f"c = {c:g}": {
          "learning_rate": [c**2 * rate for rate in rates],
          "loss": list(row),
        }
        for c, row in final.items()
      },
    },
  )


def _stable_rates(
  rates: list[float], final: Mapping[float, np.ndarray]
) -> dict[float, float | None]:
  """Returns for each c the largest rate, over c^2, up to which losses are finite."""
  stable = {c: _first(~np.isfinite(losses)) for c, losses in final.items()}
  return {c: rates[count - 1] if count else None for c, count in stable.items()}


def _trajectory_findings(
  constants: list[float], labels: list[str], comparisons: list[Comparison]
) -> list[document.Finding]:
  exact = [i for i, c in enumerate(constants) if i and math.frexp(c)[0] == 0.5]
  rounded = [i for i, c in enumerate(constants) if i and i not in exact]
  nudged, control = len(constants), len(constants) + 1
  single, double = comparisons[:2]

  def names(indices: list[int]) -> str:
    return "c = " + " and ".join(f"{constants[index]:g}" for index in indices)

  findings = []
  if exact:
    farthest = max(each.farthest(*exact) for each in comparisons)
    equal = all(
      np.array_equal(each.runs.loss[:, i], each.runs.loss[:, 0], equal_nan=True)
      for each in comparisons
      for i in exact
    )
    findings.append(
      document.Finding(
        "Powers of two, which are exact in binary, change not one bit.",
        farthest == 0 and equal,
        f"{names(exact)}: the largest distance of parameters is {farthest:.2g}, and "
        f"the losses of all steps are {'' if equal else 'not '}the same numbers, in "
        f"{'; '.join(each.title for each in comparisons)}.",
      )
    )
  if rounded:
    findings.append(
      document.Finding(
        "Other constants change nothing but rounding.",
        _same(double.farthest(*rounded), double.farthest(nudged)),
        f"{names(rounded)} at rate {double.rate:g}: the parameters are at most "
        f"{double.farthest(*rounded):.2g} of their norm away in float64 and "
        f"{single.farthest(*rounded):.2g} in float32. From initial parameters moved to "
        f"the next number, the original gets {double.farthest(nudged):.2g} and "
        f"{single.farthest(nudged):.2g} away from itself.",
      )
    )
  spans = []
  for each in comparisons:
    distance = each.runs.while_finite().distance[:, nudged]
    if len(distance):
      span = f"{len(distance)} steps, {each.title}"
      spans.append((distance[0], distance.max(), span))
  growth = [last / first for first, last, _ in spans]
  listed = "; ".join(f"{first:.2g} to {last:.2g} ({s})" for first, last, s in spans)
  findings += [
    document.Finding(
      "Rounding errors grow along a trajectory, and most where it is unstable.",
      bool(growth[3] > max(100.0, growth[1])) if len(growth) == 4 else None,
      f"The run from the next numbers gets away from the original: {listed}.",
    ),
    document.Finding(
      "The rate has to be c²η: with cη the trajectory is another.",
      min(single.farthest(control), double.farthest(control)) > _DIFFERENT,
      f"{labels[control]}: the parameters get {double.farthest(control):.2g} of their "
      f"norm away in float64, {single.farthest(control):.2g} in float32.",
    ),
  ]
  return findings


def _stable_rate_finding(
  rates: list[float], final: Mapping[float, np.ndarray]
) -> document.Finding:
  stable = _stable_rates(rates, final)
  claim = (
    "The largest stable rate is c² times as large: compare it in one architecture."
  )
  if stable[1.0] not in rates[:-1]:
    searched = f"{rates[0]:g} and {rates[-1]:g}"
    return document.Finding(claim, None, f"For c = 1 it is not between {searched}.")
  listed, differences = [], []
  for c, rate in stable.items():
    both = np.isfinite(final[c]) & np.isfinite(final[1.0])
    difference = np.abs(final[c][both] / final[1.0][both] - 1).max(initial=0)
    listed.append(f"{'none' if rate is None else f'{c**2 * rate:g}'} (c = {c:g})")
    differences += [f"{difference:.2g} (c = {c:g})"] if c != 1 else []
  return document.Finding(
    claim,
    len(set(stable.values())) == 1,
    f"Largest stable rates, by factors of two: {', '.join(listed)}. Training losses at "
    "rates that are equal over c² differ, relative to those of c = 1, by at most "
    f"{', '.join(differences)}.",
  )


def _distance_table(comparisons: list[Comparison], labels: list[str]) -> document.Table:
  return document.Table(
    name="distance",
    title="Largest relative distance of the parameters from the original's",
    header=["run", *(each.title for each in comparisons)],
    rows=[
      [label, *(f"{each.farthest(index):.2g}" for each in comparisons)]
      for index, label in enumerate(labels)
      if index
    ],
    note="|w'/c - w| / |w|, its maximum over the steps with a finite original. Nudged: "
    "every initial parameter is moved to the next number. The last run has a wrong "
    "rate on purpose.",
  )


def _distance_figures(
  comparisons: list[Comparison], labels: list[str]
) -> list[document.Figure]:
  runs = [each.runs.while_finite() for each in comparisons]
  zero = [
    i for i in range(1, len(labels)) if not any(r.distance[:, i].any() for r in runs)
  ]
  drawn = [i for i in range(1, len(labels)) if i not in zero]
  note = (
    f"{' and '.join(labels[i] for i in zero)}: zero at every step. " if zero else ""
  )
  if len(comparisons) > 2:
    note += "At the larger rate the original diverges where the curves end. "

  def draw(quantity: str) -> Any:
    return figures.line_figure(
      [
        figures.Panel(
          each.title,
          {
            labels[i]: (np.arange(1, len(run.loss) + 1), getattr(run, quantity)[:, i])
            for i in drawn
          },
        )
        for each, run in zip(comparisons, runs, strict=True)
      ],
      "step",
    )

  return [
    document.Figure(
      name="trajectories",
      title="Relative distance of the parameters from the original's",
      figure=draw("distance"),
      description="Distance by step, a panel for each precision and rate.",
      note=f"{note}In float32, runs part where rounding changes signs of inputs of "
      "ReLU, and with them the gradient.",
    ),
    document.Figure(
      name="losses",
      title="Relative difference of the loss from the original's",
      figure=draw("loss_difference"),
      description="The difference by step, a panel for each precision and rate.",
      note=note,
    ),
  ]


def _rate_figure(
  rates: list[float], final: Mapping[float, np.ndarray]
) -> document.Figure:
  own, shared = (
    {
      f"c = {c:g}": ([c**power * rate for rate in rates], losses)
      for c, losses in final.items()
    }
    for power in (2, 0)
  )
  return document.Figure(
    name="rates",
    title="Training loss by learning rate",
    figure=figures.line_figure(
      [
        figures.Panel("by learning rate", own, log_x=True),
        figures.Panel("by learning rate / c²", shared, log_x=True),
      ],
      "learning rate",
    ),
    description="Training loss by learning rate, a curve for each constant, and by "
    "learning rate over the squared constant, where all curves are one.",
    note="Mean loss of the last epoch's batches, float32. A curve ends where larger "
    "rates diverge.",
  )


class Decay(NamedTuple):
  """The runs of one precision and one epsilon of batch norm.

  Attributes:
    title: names precision and epsilon.
    runs: what each run did, by its name; "decay" is the original.
    invariant: which parameters are scale-invariant, a tree of booleans.
  """

  title: str
  runs: dict[str, equivalence.Run]
  invariant: Any

  def observed(self, name: str, quantity: str) -> np.ndarray:
    """Returns what was observed of a run before each step."""
    return np.asarray(self.runs[name].observed[quantity])

  def difference(self, name: str, mode: str = "train") -> np.ndarray:
    """Returns a run's `function_difference` from the original on held-out images.

    Args:
      name: the run.
      mode: "train": with the statistics of the batch; "test": with moving averages.
    """
    return equivalence.function_difference(
      self.observed(name, mode), self.observed("decay", mode)
    )

  def kernels(self, name: str) -> np.ndarray:
    """Returns the scale-invariant parameters behind the last step, as one vector."""
    leaves = jax.tree.leaves(self.runs[name].params)
    chosen = zip(leaves, jax.tree.leaves(self.invariant), strict=True)
    return np.concatenate([leaf.ravel() for leaf, invariant in chosen if invariant])


def run_weight_decay(config: EquivalenceConfig) -> Outcome:
  """Trains with weight decay, and without it at Li & Arora's growing rate.

  Args:
    config: a valid configuration.

  Returns:
    What it found.
  """
  method = methods.get("batch_norm")
  _make_network(config, method, "float32")
  task = _load(config)
  rho = equivalence.decay_root(config.learning_rate, config.momentum, config.l2)
  rates = equivalence.growing_rates(config.learning_rate, rho, config.steps)
  pair, epsilon = ("decay", "growth"), methods.batch_normalizer.keywords["epsilon"]
  double, single, default = (
    _train_decay(config, task, *kind)
    for kind in (
      ("float64", _NO_EPSILON, (*pair, "nudged", *_CONTROLS)),
      ("float32", _NO_EPSILON, (*pair, "nudged")),
      ("float64", epsilon, pair),
    )
  )
  summary = _difference_table(config, double, single, default)
  return Outcome(
    title="Batch norm: weight decay is a growing learning rate",
    lead=f"{_describe(config, method)} at rate {config.learning_rate:g}. Without L2 on "
    f"all kernels but the classifier's, and with {config.learning_rate:g} rho^(-2t-1) "
    f"as their rate, rho = {rho:.6g}, it is the same function at every step t (Li & "
    "Arora, ICLR 2020).",
    findings=[
      *_same_function_findings(config, rho, rates, double),
      *_end_findings(rates, double, single, default),
    ],
    summary=summary,
    sections=[
      document.Section(
        "Functions", "", [summary, _function_figure(double, single, default)]
      ),
      document.Section("Runs", "", [_run_figure(config, rates, double)]),
    ],
    numbers={
      "rho": rho,
      "steps": _thin(np.arange(config.steps)),
      "growing_rate": _thin(rates),
      "runs": {
        kind.title: {
          name: {
            "loss": _thin(run.loss),
            "norm": _thin(kind.observed(name, "norm")),
            "difference": _thin(kind.difference(name)),
            "difference_in_evaluation": _thin(kind.difference(name, "test")),
          }
          for name, run in kind.runs.items()
        }
        for kind in (double, single, default)
      },
    },
  )


def _train_decay(
  config: EquivalenceConfig,
  task: Task,
  dtype: str,
  epsilon: float,
  names: Iterable[str],
) -> Decay:
  normalizer = functools.partial(methods.batch_normalizer, epsilon=epsilon)
  method = dataclasses.replace(methods.get("batch_norm"), normalizer=normalizer)
  network = _make_network(config, method, dtype)
  initial = _init(config, method, task)
  invariant = equivalence.scale_invariant(initial["params"])
  rate, momentum, l2 = config.learning_rate, config.momentum, config.l2
  rho = equivalence.decay_root(rate, momentum, l2)

  def setting(rates: np.ndarray, l2: float, velocity: float) -> dict[str, Any]:
    # Beyond float32 the rate is infinite, as it should be.
    with np.errstate(over="ignore"):
      return {"rates": rates.astype(dtype), "l2": l2, "velocity": velocity}

  def growing(rho: float, velocity: float) -> dict[str, Any]:
    return setting(equivalence.growing_rates(rate, rho, config.steps), 0.0, velocity)

  constant = np.full(config.steps, rate)
  settings = {
    "decay": setting(constant, l2, 0.0),
    "nudged": setting(constant, l2, 0.0),
    "growth": growing(rho, equivalence.initial_velocity(rate, rho)),
    "constant": setting(constant, 0.0, 0.0),
    # Li & Arora's growth for momentum zero.
    "no_momentum": growing(1 - rate * l2, 0.0),
    "no_velocity": growing(rho, 0.0),
  }

  def make_optimizer(setting: dict[str, Any]) -> optax.GradientTransformation:
    schedule, l2, velocity = (
      setting["rates"].__getitem__,
      setting["l2"],
      setting["velocity"],
    )
    return optax.partition(
      {
        True: equivalence.sgd(schedule, momentum, l2, velocity),
        False: equivalence.sgd(rate, momentum, config.l2),
      },
      invariant,
    )

  def loss(params: Any, state: Any, batch: Any) -> tuple[jax.Array, Any]:
    images, labels = batch
    variables = {"params": params, **state}
    logits, state = network.apply(variables, images, train=True, mutable=list(state))
    return _cross_entropy(logits, labels), state

  def observe(params: Any, state: Any) -> dict[str, jax.Array]:
    variables = {"params": params, **state}
    images = jnp.asarray(task.held_out, dtype)
    logits, _ = network.apply(variables, images, train=True, mutable=list(state))
    kernels = jax.tree.map(lambda p, use: p if use else None, params, invariant)
    variances = [
      leaf.max()
      for path, leaf in jax.tree_util.tree_leaves_with_path(state)
      if path[-1].key == "var"
    ]
    return {
      "train": logits,
      "test": network.apply(variables, images, train=False),
      "norm": optax.tree.norm(kernels),
      "variance": jnp.stack(variances).max(),
    }

  with jax.enable_x64(dtype == "float64"):
    state = _cast(initial, dtype)
    params = state.pop("params")
    nudged = equivalence.nudge(params)
    runs = equivalence.observed_runs(
      loss,
      make_optimizer,
      {
        name: (nudged if name == "nudged" else params, settings[name]) for name in names
      },
      state,
      task.batches(dtype),
      observe,
    )
  title = dtype if epsilon == _NO_EPSILON else f"{dtype}, ε = {epsilon:g}"
  return Decay(title, runs, invariant)


def _same_function_findings(
  config: EquivalenceConfig, rho: float, rates: np.ndarray, double: Decay
) -> list[document.Finding]:
  difference = double.difference("growth").max()
  losses = np.abs(double.runs["growth"].loss / double.runs["decay"].loss - 1).max()
  norms, grown = (double.observed(name, "norm") for name in ("decay", "growth"))
  kernels = double.kernels("decay")
  distance = kernels - rho**config.steps * double.kernels("growth")
  controls = {title: double.difference(name).max() for name, title in _CONTROLS.items()}
  listed = ", ".join(f"{title} {value:.2g}" for title, value in controls.items())
  return [
    document.Finding(
      "Weight decay at a constant rate, and none at Li & Arora's growing rate, are the "
      "same function at every step.",
      _same(difference, double.difference("nudged").max()),
      f"In {config.steps} steps the logits of held-out images differ by at most "
      f"{difference:.2g} of the largest, and the training losses by {losses:.2g} of "
      f"theirs, in float64. The rate grows from {rates[0]:.3g} to {rates[-1]:.3g} and "
      f"the kernels' norm from {grown[0]:.3g} to {grown[-1]:.3g}; with decay it goes "
      f"to {norms[-1]:.3g}. Times rho^t, the last kernels are "
      f"{np.linalg.norm(distance) / np.linalg.norm(kernels):.2g} of their norm away "
      "from those with decay.",
    ),
    document.Finding(
      "The growth has to count momentum, and to begin with a velocity.",
      bool(min(controls.values()) > _DIFFERENT),
      f"Largest difference of the logits without decay, in float64: {listed}.",
    ),
  ]


def _end_findings(
  rates: np.ndarray, double: Decay, single: Decay, default: Decay
) -> list[document.Finding]:
  """Says where the equivalence ends."""
  steps = len(rates)
  broken = default.difference("growth")
  means = [default.runs[name].loss.mean() for name in ("decay", "growth")]
  moving = double.difference("growth", "test")
  with_decay, growing = (
    double.observed(name, "test").argmax(-1) for name in ("decay", "growth")
  )
  vanishes = _first(
    double.observed("growth", "variance") > equivalence.LARGEST_VARIANCE
  )
  apart, rounding = (single.difference(name) for name in ("growth", "nudged"))
  with np.errstate(invalid="ignore"):
    norms = single.observed("growth", "norm") / double.observed("growth", "norm")
  parts = _first(~(np.abs(norms - 1) < _NORM_TOLERANCE))
  alike = bool(apart[:parts].max() <= 10 * rounding[:parts].max())
  overflows = _first(rates > np.finfo(np.float32).max)
  fails = _first(~np.isfinite(single.runs["growth"].loss))
  return [
    document.Finding(
      "Batch norm's default epsilon ends the equivalence.",
      bool(broken.max() > _TOLERANCE),
      f"{default.title}: the logits differ by {broken[1]:.2g} after one step and by at "
      f"most {broken.max():.2g}; the mean training loss is {means[0]:.5g} with decay "
      f"and {means[1]:.5g} without.",
    ),
    document.Finding(
      "In evaluation the two are different functions: moving averages lag behind "
      "parameters that grow.",
      bool(moving.max() > _DIFFERENT),
      f"With moving averages the logits differ by {np.median(moving):.2g} of the "
      f"largest in the median step; {100 * np.mean(with_decay == growing):.1f} % of "
      "the held-out images get the same class.",
    ),
    document.Finding(
      "In float32 the two get as far apart as rounding takes a run from itself, while "
      "all numbers are in its range.",
      # One rounding may start what another does not.
      False if apart[1] > _DIFFERENT else alike or None,
      f"The logits differ by {apart[1]:.2g} after one step and by at most "
      f"{apart[:parts].max():.2g} in {parts} steps; the "
      "run with decay, started from the next numbers, gets "
      f"{rounding[:parts].max():.2g} away from itself.",
    ),
    document.Finding(
      "The range of float32 ends the growth, first in the gradient of batch norm.",
      bool(abs(parts - vanishes) < 0.05 * vanishes and abs(fails - overflows) < 3)
      if fails < steps
      else None,
      f"Its factor variance^(-3/2) / 2 is too small for float32 from step {vanishes}, "
      f"and from step {parts} the kernels' norm is more than {100 * _NORM_TOLERANCE:g} "
      f"% off. The rate is infinite from step {overflows}, the loss not finite from "
      f"step {fails}."
      if fails < steps
      else f"The loss is finite in all {steps} steps.",
    ),
  ]


def _difference_table(
  config: EquivalenceConfig, double: Decay, single: Decay, default: Decay
) -> document.Table:
  listed = [(kind, "growth", "growing rate") for kind in (double, single, default)]
  listed += [(kind, "nudged", "weight decay, nudged") for kind in (double, single)]
  listed += [(double, name, f"control: {title}") for name, title in _CONTROLS.items()]
  rows = []
  for kind, name, title in listed:
    difference = kind.difference(name)
    steps = _first(~np.isfinite(difference))
    means = [kind.runs[run].loss[:steps].mean() for run in (name, "decay")]
    rows.append(
      [
        f"{title}, {kind.title}",
        str(steps),
        f"{difference[1]:.2g}",
        f"{difference[:steps].max():.2g}",
        *(f"{mean:.6g}" for mean in means),
      ]
    )
  return document.Table(
    name="difference",
    title="Difference of each run from the one with weight decay",
    header=[
      "run",
      "finite steps",
      "after one step",
      "largest",
      "mean training loss",
      "with decay",
    ],
    rows=rows,
    note="Largest difference of the logits of held-out images over the largest logit, "
    "with the statistics of the batch. Largest and means are over the finite steps. "
    "Epsilon is 1e-30 where none is named. Nudged: every initial parameter is moved to "
    "the next number.",
  )


def _function_figure(double: Decay, single: Decay, default: Decay) -> document.Figure:
  growth = {kind.title: kind.difference("growth") for kind in (double, single, default)}
  growth["float64, moving averages"] = double.difference("growth", "test")
  controls = {title: double.difference(name) for name, title in _CONTROLS.items()}
  left, right = (
    {label: (np.arange(len(values)), values) for label, values in lines.items()}
    for lines in (growth, controls)
  )
  return document.Figure(
    name="functions",
    title="Difference of the function from that of the run with weight decay",
    figure=figures.line_figure(
      [
        figures.Panel("Li & Arora's growing rate", left),
        figures.Panel("controls, float64", right, log_y=False),
      ],
      "step",
    ),
    description="Largest difference of the logits by step, at the equivalent rate on a "
    "logarithmic axis, and of controls that are not equivalent on a linear one.",
    note="Over the largest logit of held-out images. Normalized with the statistics of "
    "the batch but for moving averages, and with an epsilon of 1e-30 where none is "
    "named. The axis on the right is linear.",
  )


def _run_figure(
  config: EquivalenceConfig, rates: np.ndarray, double: Decay
) -> document.Figure:
  titles = {
    "decay": "weight decay, constant rate",
    "growth": "no decay, growing rate",
    "constant": "no decay, constant rate",
  }
  constant = np.full_like(rates, config.learning_rate)
  decay, growth = (double.runs[name].loss for name in ("decay", "growth"))
  # Losses of single batches would hide each other.
  size = max(1, config.steps // 60)
  means = {
    title: double.runs[name].loss[: len(decay) // size * size].reshape(-1, size).mean(1)
    for name, title in titles.items()
  }
  norms = {title: double.observed(name, "norm") for name, title in titles.items()}
  learning_rates = {titles["decay"]: constant, titles["growth"]: rates}
  difference = {titles["growth"]: np.abs(growth / decay - 1)}
  panels = [
    figures.Panel(
      title, {name: (every * np.arange(len(y)), y) for name, y in lines.items()}
    )
    for title, lines, every in (
      ("norm of the kernels", norms, 1),
      ("learning rate", learning_rates, 1),
      ("training loss", means, size),
      ("relative difference of the loss", difference, 1),
    )
  ]
  return document.Figure(
    name="runs",
    title="What grows, what shrinks, and what is the same",
    figure=figures.line_figure(panels, "step"),
    description="Norm of the scale-invariant kernels, learning rate and training loss "
    "by step; with weight decay and with the growing rate the loss is one curve.",
    note="float64. The kernels are all but the classifier's; training losses are means "
    f"of {size} steps, and their difference is from the run with weight decay.",
  )


def _report(config: EquivalenceConfig, outcome: Outcome) -> document.Document:
  return document.Document(
    title=outcome.title,
    lead=outcome.lead,
    findings=outcome.findings,
    sections=outcome.sections,
    config=dataclasses.asdict(config),
    versions={
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "flax", "optax", "numpy")
    },
    device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    command=shlex.join(["python", "-m", "experiments.equivalence", *sys.argv[1:]]),
  )


if __name__ == "__main__":
  program.run(main)
