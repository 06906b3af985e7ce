"""Draws the pictures of docs/concepts.md, and writes the numbers that the page says.

Example:
  python -m experiments.concepts --workdir=docs/figures
"""

import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import program
from skipinit_jax import data, methods, models
from skipinit_jax.analysis import figures, measure, theory
from skipinit_jax.analysis.signal import Signal
from skipinit_jax.files import write_json
from skipinit_jax.studies.history import make_history, read_signal
from skipinit_jax.training import TrainConfig, train
from skipinit_jax.training.metrics import read_metrics

# matplotlib takes most of a second to import.
if TYPE_CHECKING:
  from matplotlib.figure import Figure

_WORKDIR = program.define_workdir("the pictures and concepts.json")

DEPTH = 100
"""Residual blocks of the network at initialization."""

METHODS = (
  "batch_norm",
  "skipinit_inverse_sqrt_depth",
  "divide_by_sqrt2",
  "unnormalized",
)
"""The networks at initialization."""

_WIDTH = 256
_BATCH_SIZE = 64
_NUM_SEEDS = 4
# Epochs, steps between measurements, and the rates at which `make demo` trains best.
_EPOCHS, _SIGNAL_EVERY_STEPS = 4, 2
_TRAINED = {"skipinit": 2.0**-4, "batch_norm": 2.0**-4}
_DPI = 150


def main() -> None:
  """Runs the program."""
  workdir = pathlib.Path(_WORKDIR.value)
  workdir.mkdir(parents=True, exist_ok=True)
  curves = measure_curves(METHODS)
  histories, accuracies = _train()
  drawn: dict[str, Figure] = {
    "stream": figures.stream_figure(curves),
    "ratio": figures.ratio_figure(curves),
    "paths": figures.path_figure(curves),
    "cosine": figures.cosine_figure(curves),
    "training": figures.heat_map_figures(histories)[0],
  }
  for name, figure in drawn.items():
    # Without the version of matplotlib, which would change the file.
    figure.savefig(workdir / f"{name}.png", dpi=_DPI, metadata={"Software": None})
  numbers = {
    "initialization": {
      name: {
        "measured": signal_numbers(curve.measured.mean),
        "theory": signal_numbers(curve.theory) if curve.theory else None,
      }
      for name, curve in zip(METHODS, curves, strict=True)
    },
    "training": {
      methods.get(name).title: {
        "learning_rate": rate,
        "test_accuracy": accuracies[name],
        **_trained_numbers(histories[methods.get(name).title]),
      }
      for name, rate in _TRAINED.items()
    },
  }
  write_json(workdir / "concepts.json", numbers)
  print(f"Pictures and concepts.json: {workdir}")


def make_inputs() -> jax.Array:
  """Returns the batch that passes through the networks: digits, [64, 8, 8, 1]."""
  digits = data.load("digits")
  images = jnp.asarray(digits.train.images[:_BATCH_SIZE])
  return data.augmentation.normalize(images, digits.mean, digits.std)


def make_network(method: str) -> models.ResidualMLP:
  """Returns the network that is measured at initialization, of a method's name."""
  return models.ResidualMLP(DEPTH, _WIDTH, num_classes=10, method=methods.get(method))


def measure_curves(names: Sequence[str]) -> list[figures.Curve]:
  """Measures networks at initialization, and predicts them.

  Args:
    names: of the methods.
  """
  images = make_inputs()
  curves = []
  for name in names:
    network = make_network(name)
    measured = measure.over_seeds(network, images, num_seeds=_NUM_SEEDS, train=True)
    predicted = theory.predict_model(network, images)
    curves.append(figures.Curve(network.method.title, measured, predicted))
  return curves


def signal_numbers(signal: Signal) -> dict[str, float]:
  """Returns the numbers of a signal that the page says."""
  with np.errstate(all="ignore"):
    growth = signal.second_moment[-1] / signal.second_moment[0]
    weights = theory.path_weights(signal.branch_share)
    numbers = {
      "growth": growth,
      "growth_per_block": growth ** (1 / DEPTH),
      "stream_added_per_block": (signal.second_moment[-1] - signal.second_moment[0])
      / DEPTH,
      "last_branch_to_skip": signal.branch_to_skip[-1],
      "mean_path_length": theory.mean_path_length(weights),
      "cosine_before": signal.cosine[0],
      "cosine_behind": signal.cosine[-1],
      "gradient_growth": signal.relative_gradient[0],
    }
  return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def _train() -> tuple[dict[str, figures.SignalHistory | str], dict[str, float | None]]:
  """Trains networks of 100 layers, and returns their signals and test accuracies."""
  histories: dict[str, figures.SignalHistory | str] = {}
  accuracies = {}
  for name, rate in _TRAINED.items():
    config = TrainConfig(
      method=name,
      depth=100,
      epochs=_EPOCHS,
      learning_rate=rate,
      signal_every_steps=_SIGNAL_EVERY_STEPS,
    )
    with tempfile.TemporaryDirectory() as folder:
      result = train(config, folder)
      history = read_signal(make_history(read_metrics(folder)))
    histories[methods.get(name).title] = history
    accuracies[name] = result.test_accuracy
  return histories, accuracies


def _trained_numbers(history: Any) -> Mapping[str, float]:
  """Returns what the page says of a training: median over blocks, first and last."""
  numbers = {}
  for name in figures.SIGNAL_QUANTITIES:
    if name not in history:
      continue
    values = history[name]
    for when, of_blocks in (("first", values[0]), ("last", values[-1])):
      numbers[f"{name}_{when}"] = float(f"{np.median(np.abs(of_blocks)):.3g}")
      numbers[f"{name}_{when}_max"] = float(f"{np.abs(of_blocks).max():.3g}")
  return numbers


if __name__ == "__main__":
  program.run(main)
