"""Divided parameters at a multiplied rate: the same training of SkipInit's network."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.configs.equivalence import EquivalenceConfig
from experiments.equivalences import common
from experiments.equivalences.common import Outcome
from skipinit_jax import document, methods
from skipinit_jax.analysis import equivalence, figures
from skipinit_jax.errors import UsageError

# Learning rates of the search for the largest stable one, over the configured rate.
_RATE_FACTORS = [2.0**exponent for exponent in range(-6, 5)]


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
  networks = {
    dtype: common.make_network(config, method, dtype) for dtype in common.PRECISIONS
  }
  task = common.load(config)
  initial = common.initialize(config, method, task)["params"]
  constants = [1.0, *map(float, config.constants)]
  make = equivalence.Reparameterization

  def train(
    dtype: str, runs: Callable[[Any], list[equivalence.Reparameterization]]
  ) -> equivalence.Trajectories:
    def loss(params: Any, batch: Any) -> jax.Array:
      images, labels = batch
      logits = networks[dtype].apply({"params": params}, images, train=True)
      return common.cross_entropy(logits, labels)

    with jax.enable_x64(dtype == "float64"):
      return equivalence.trajectories(
        loss,
        runs(common.cast(initial, dtype)),
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
  comparisons = [compare(config.learning_rate, dtype) for dtype in common.PRECISIONS]
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
    comparisons += [compare(unstable, dtype) for dtype in common.PRECISIONS]

  summary = _distance_table(comparisons, labels)
  return Outcome(
    title="Reparameterization: divided parameters at a multiplied rate",
    lead=f"{common.describe(config, method)}. L(w) from w₀ at rate η, and L(w / c) "
    "from c w₀ at rate c²η, are the same trajectory: w' = c w.",
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
      "steps": common.thin(np.arange(1, config.steps + 1)),
      "trajectories": {
        each.title: {
          label: {
            "loss": common.thin(each.runs.loss[:, index]),
            "distance": common.thin(each.runs.distance[:, index]),
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
  stable = {c: common.first(~np.isfinite(losses)) for c, losses in final.items()}
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
        common.same(double.farthest(*rounded), double.farthest(nudged)),
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
      min(single.farthest(control), double.farthest(control)) > common.DIFFERENT,
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
