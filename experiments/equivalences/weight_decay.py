"""Batch norm with weight decay, and without it at a rate that grows."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.configs.equivalence import EquivalenceConfig
from experiments.equivalences import common
from experiments.equivalences.common import Outcome, Task
from skipinit_jax import document, methods
from skipinit_jax.analysis import equivalence, figures

# Does nothing to variances that float32 can represent, but keeps 0 / 0 away.
_NO_EPSILON = 1e-30
# Relative distance between norms that says that two runs have parted.
_NORM_TOLERANCE = 0.1
_CONTROLS = {
  "constant": "constant rate",
  "no_momentum": "growth as without momentum",
  "no_velocity": "no initial velocity",
}


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
  common.make_network(config, method, "float32")
  task = common.load(config)
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
    lead=f"{common.describe(config, method)} at rate {config.learning_rate:g}. Without "
    f"L2 on all kernels but the classifier's, and with {config.learning_rate:g} "
    f"rho^(-2t-1) as their rate, rho = {rho:.6g}, it is the same function at every "
    "step t (Li & Arora, ICLR 2020).",
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
      "steps": common.thin(np.arange(config.steps)),
      "growing_rate": common.thin(rates),
      "runs": {
        kind.title: {
          name: {
            "loss": common.thin(run.loss),
            "norm": common.thin(kind.observed(name, "norm")),
            "difference": common.thin(kind.difference(name)),
            "difference_in_evaluation": common.thin(kind.difference(name, "test")),
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
  network = common.make_network(config, method, dtype)
  initial = common.initialize(config, method, task)
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
    return common.cross_entropy(logits, labels), state

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
    state = common.cast(initial, dtype)
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
      common.same(difference, double.difference("nudged").max()),
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
      bool(min(controls.values()) > common.DIFFERENT),
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
  vanishes = common.first(
    double.observed("growth", "variance") > equivalence.LARGEST_VARIANCE
  )
  apart, rounding = (single.difference(name) for name in ("growth", "nudged"))
  with np.errstate(invalid="ignore"):
    norms = single.observed("growth", "norm") / double.observed("growth", "norm")
  parts = common.first(~(np.abs(norms - 1) < _NORM_TOLERANCE))
  alike = bool(apart[:parts].max() <= 10 * rounding[:parts].max())
  overflows = common.first(rates > np.finfo(np.float32).max)
  fails = common.first(~np.isfinite(single.runs["growth"].loss))
  return [
    document.Finding(
      "Batch norm's default epsilon ends the equivalence.",
      bool(broken.max() > common.TOLERANCE),
      f"{default.title}: the logits differ by {broken[1]:.2g} after one step and by at "
      f"most {broken.max():.2g}; the mean training loss is {means[0]:.5g} with decay "
      f"and {means[1]:.5g} without.",
    ),
    document.Finding(
      "In evaluation the two are different functions: moving averages lag behind "
      "parameters that grow.",
      bool(moving.max() > common.DIFFERENT),
      f"With moving averages the logits differ by {np.median(moving):.2g} of the "
      f"largest in the median step; {100 * np.mean(with_decay == growing):.1f} % of "
      "the held-out images get the same class.",
    ),
    document.Finding(
      "In float32 the two get as far apart as rounding takes a run from itself, while "
      "all numbers are in its range.",
      # One rounding may start what another does not.
      False if apart[1] > common.DIFFERENT else alike or None,
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
    steps = common.first(~np.isfinite(difference))
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
