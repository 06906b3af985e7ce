r"""Measures how signal and gradient pass through networks, on the lines of theory.

Example:
  python -m experiments.signal_propagation --workdir=/tmp/signal --diagnose

Any model, methods and depth:
  python -m experiments.signal_propagation --workdir=/tmp/signal \
    --config.model=wide_resnet --config.depth=100 --config.width=2 \
    --config.methods="('batch_norm', 'skipinit')"
"""

import dataclasses
import functools
import importlib.metadata
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import program
from experiments.initial_signals import LINEAR, NOISE, SignalConfig, measure_networks
from skipinit_jax import analysis, document
from skipinit_jax.analysis import figures, theory
from skipinit_jax.analysis.signal import Signal
from skipinit_jax.files import write_json

CONFIGS: dict[str, Callable[[], SignalConfig]] = {
  # Less than a minute on a CPU.
  "demo": SignalConfig,
  # The paper's linear fully connected networks, normalized and not.
  "linear": functools.partial(
    SignalConfig,
    model=LINEAR,
    depth=100,
    width=256,
    methods=("unnormalized", "batch_norm"),
    dataset=NOISE,
    batch_size=128,
  ),
  # Its batch-normalized convolutional network, beside the unnormalized.
  "batch_norm": functools.partial(
    SignalConfig,
    model="wide_resnet",
    depth=40,
    width=1,
    methods=("batch_norm", "unnormalized"),
    batch_size=32,
  ),
  # Convolutional networks with several initial values of SkipInit's scalar.
  "skipinit": functools.partial(
    SignalConfig,
    model="wide_resnet",
    depth=40,
    width=1,
    methods=("skipinit", "skipinit_inverse_sqrt_depth", "skipinit_one"),
    batch_size=32,
  ),
}

# What signal.json has of each network: entries of a Signal.
_QUANTITIES = (
  *(
    field.name
    for field in dataclasses.fields(Signal)
    if field.name not in ("names", "alpha")
  ),
  "branch_to_skip",
  "relative_gradient",
)
_SUMMARY: dict[str, Callable[[Signal], Any]] = {
  "second moment of the last block's output": lambda each: each.second_moment[..., -1],
  "branch-to-skip ratio of the last block": lambda each: each.branch_to_skip[..., -1],
  "gradient before the first block": lambda each: each.relative_gradient[..., 0],
  "cosine similarity behind the last block": lambda each: each.cosine[..., -1],
  # The sum of the shares is the mean length of the paths.
  "mean length of the paths": lambda each: each.branch_share.sum(-1),
}


def main(config: SignalConfig, workdir: str, diagnose: bool) -> None:
  """Measures the networks, and writes and prints what comes out.

  Args:
    diagnose: whether to print and write verdicts.
  """
  curves = measure_networks(config)
  # A signal that overflows has ratios that are no numbers.
  with np.errstate(all="ignore"):
    page, *_ = document.write(_report(config, curves, diagnose), workdir)
    numbers = {name: _numbers(curve) for name, curve in curves.items()}
    write_json(
      pathlib.Path(workdir, "signal.json"),
      {"config": dataclasses.asdict(config), "networks": numbers},
    )
    document.print_table(_summary_table(curves))
  if diagnose:
    for curve in curves.values():
      print(f"{curve.label}: {_diagnose(curve)}\n")
  program.print_report(page)


def _diagnose(curve: figures.Curve) -> analysis.Diagnosis:
  return analysis.diagnose_signal(curve.measured.mean)


def _numbers(curve: figures.Curve) -> dict[str, Any]:
  """Returns all numbers of a network, for `signal.json`."""
  _, measured, predicted = curve
  diagnosis = _diagnose(curve)
  judged = dataclasses.asdict(diagnosis)
  del judged["signal"]  # It is in "mean".
  means, errors = {}, {}
  for name in _QUANTITIES:
    values = getattr(measured.signals, name)
    means[name], errors[name] = figures.mean_and_error(values)
  weights = figures.measured_path_weights(measured)
  numbers: dict[str, Any] = {
    "blocks": measured.signals.names,
    "mean": means,
    "standard_error": errors,
    "theory": predicted and {name: getattr(predicted, name) for name in _QUANTITIES},
    "path_weights": weights and {"mean": weights[0], "standard_error": weights[1]},
    "path_weights_of_theory": predicted and theory.path_weights(predicted.branch_share),
    "diagnosis": judged | {"text": diagnosis.text, "healthy": diagnosis.healthy},
  }
  return jax.tree.map(lambda x: x.tolist() if isinstance(x, np.ndarray) else x, numbers)


def _summary_table(curves: Mapping[str, figures.Curve]) -> document.Table:
  rows = []
  for label, measured, predicted in curves.values():
    for name, quantity in _SUMMARY.items():
      mean, error = figures.mean_and_error(quantity(measured.signals))
      text = f"{mean:.3g} ± {error:.1g}" if np.isfinite(error) else f"{mean:.3g}"
      expected = "" if predicted is None else f"{quantity(predicted):.3g}"
      rows.append([label, name, text, expected])
  return document.Table(
    name="summary",
    title="From the first block to the last, measured and predicted",
    header=["method", "quantity", "measured", "theory"],
    rows=rows,
    note="Means ± standard errors over the seeds. The branch-to-skip ratio is of "
    "variances; the gradient's second moment is over that behind the last block; a "
    "path's length is the number of its branches. All blocks are in signal.json.",
  )


def _verdict_table(curves: Mapping[str, figures.Curve]) -> document.Table:
  good, bad = document.Entry("healthy", "good"), document.Entry("faulty", "bad")
  rows: list[list[str | document.Entry]] = []
  for curve in curves.values():
    diagnosis = _diagnose(curve)
    rows.append([curve.label, good if diagnosis.healthy else bad, diagnosis.text])
  return document.Table(
    name="verdict",
    title="Does the depth let the network train?",
    header=["method", "verdict", "in words"],
    rows=rows,
    note="The verdict is on the signal at initialization, averaged over the seeds. A "
    "normalizer behind the last block makes growth forward harmless.",
  )


def _figures(curves: Sequence[figures.Curve]) -> list[document.Figure]:
  points = "Points are means over the seeds, with standard errors"
  points += "; lines are theory." if any(curve.theory for curve in curves) else "."
  no_zero = "A branch of zeros is not on a logarithmic axis."
  drawn = {
    "stream": (
      "Second moment and variance of the stream",
      figures.stream_figure,
      "The variance is over examples and positions in each channel: it lacks the "
      "channels' squared means.",
    ),
    "branch": (
      "Second moment and variance of skip path and branch",
      figures.branch_figure,
      no_zero,
    ),
    "ratio": ("How much of a block is its branch", figures.ratio_figure, no_zero),
    "gradient": (
      "Second moment of the gradient, from the last block to the first",
      figures.gradient_figure,
      "It is divided by that behind the last block.",
    ),
    "cosine": ("Cosine similarity of two inputs", figures.cosine_figure, ""),
    "paths": (
      "The network as a sum of paths: their weight by length",
      figures.path_figure,
      "A path takes the skip path or the branch at each block; its length counts the "
      "branches.",
    ),
  }
  return [
    document.Figure(
      name=name,
      title=title,
      figure=draw(curves),
      description=f"{title}, for each method.",
      note=f"{points} {note}".strip(),
    )
    for name, (title, draw, note) in drawn.items()
  ]


def _report(
  config: SignalConfig, curves: Mapping[str, figures.Curve], diagnose: bool
) -> document.Document:
  images = (
    "noise" if config.dataset == NOISE else f"training images of {config.dataset}"
  )
  sections = [
    document.Section("Summary", "", [_summary_table(curves)]),
    document.Section("By block", "", _figures(list(curves.values()))),
  ]
  if diagnose:
    sections.insert(1, document.Section("Verdict", "", [_verdict_table(curves)]))
  num_blocks = len(next(iter(curves.values())).measured.signals.names)
  return document.Document(
    title="Signal propagation at initialization",
    lead=f"{config.model} of {num_blocks} residual blocks, {config.num_seeds} "
    f"initializations of each method, a batch of {config.batch_size} {images}.",
    findings=[],
    sections=sections,
    config=dataclasses.asdict(config),
    versions={
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "flax", "numpy")
    },
    device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    command=document.command_line(),
  )


if __name__ == "__main__":
  _WORKDIR = program.define_workdir("signal.json, the figures, tables and report")
  _CONFIG = program.define_config(CONFIGS, default="demo")
  _DIAGNOSE = flags.DEFINE_boolean(
    "diagnose", False, "Whether to say of each network if its depth lets it train."
  )
  program.run(lambda: main(_CONFIG.value, _WORKDIR.value, _DIAGNOSE.value))
