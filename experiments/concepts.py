"""Draws the pictures of docs/concepts.md, and writes the numbers that the page says.

Example:
  python -m experiments.concepts --workdir=docs/figures
"""

import dataclasses
import pathlib
import tempfile

import numpy as np
from numpy.typing import ArrayLike

from experiments import initial_signals, program
from experiments.initial_signals import SignalConfig
from skipinit_jax import methods
from skipinit_jax.analysis import figures
from skipinit_jax.analysis.signal import Signal
from skipinit_jax.document import drawing
from skipinit_jax.files import write_file, write_json
from skipinit_jax.studies.history import make_history, read_signal
from skipinit_jax.training import TrainConfig, train
from skipinit_jax.training.metrics import read_metrics

DEPTH = 100
"""Residual blocks of the networks at initialization, and layers of those trained."""

CONFIG = SignalConfig(depth=DEPTH, width=256)
"""The networks at initialization."""

ZERO_SCALE = "batch_norm_zero_scale"
"""A method without curves: its branches are zero."""

# The rates at which `make demo` trains best.
_RATES = {"skipinit": 2.0**-4, "batch_norm": 2.0**-4}


def main(workdir: pathlib.Path) -> None:
  """Measures and trains, and writes pictures and numbers."""
  workdir.mkdir(parents=True, exist_ok=True)
  by_method = initial_signals.measure_networks(CONFIG)
  zero = dataclasses.replace(CONFIG, methods=(ZERO_SCALE,))
  noise = dataclasses.replace(CONFIG, methods=("batch_norm",), dataset="noise")
  initialization, of_zero, of_noise = (
    {
      name: {
        "measured": signal_numbers(measured.mean),
        "theory": signal_numbers(predicted) if predicted else None,
      }
      for name, (_, measured, predicted) in networks.items()
    }
    for networks in (
      by_method,
      *map(initial_signals.measure_networks, (zero, noise)),
    )
  )
  histories: dict[str, figures.SignalHistory | str] = {}
  training = {}
  for name, rate in _RATES.items():
    history, accuracy = _train(name, rate)
    title = methods.get(name).title
    histories[title] = history
    training[title] = {
      "learning_rate": rate,
      "test_accuracy": accuracy,
      **_trained_numbers(history),
    }
  curves = list(by_method.values())
  drawn = {
    "stream": figures.stream_figure(curves),
    "ratio": figures.ratio_figure(curves),
    "paths": figures.path_figure(curves),
    "cosine": figures.cosine_figure(curves),
    "training": figures.heat_map_figures(histories)[0],
  }
  for name, figure in drawn.items():
    write_file(workdir / f"{name}.png", drawing.image(figure))
  numbers = {
    "initialization": initialization | of_zero,
    "initialization_on_noise": of_noise,
    "dimensions": {
      name: float(f"{dimensions(initial_signals.make_images(config)):.3g}")
      for name, config in (("digits", CONFIG), ("noise", noise))
    },
    "training": training,
  }
  write_json(workdir / "concepts.json", numbers)
  print(f"Pictures and concepts.json: {workdir}")


def signal_numbers(signal: Signal) -> dict[str, float]:
  """Returns the numbers of a signal that the page says."""
  moment = signal.second_moment
  with np.errstate(all="ignore"):
    growth = moment[-1] / moment[0]
    numbers = {
      "growth": growth,
      "growth_per_block": growth ** (1 / DEPTH),
      "stream_added_per_block": (moment[-1] - moment[0]) / DEPTH,
      "last_branch_to_skip": signal.branch_to_skip[-1],
      "mean_path_length": signal.branch_share.sum(),
      "cosine_before": signal.cosine[0],
      "cosine_behind": signal.cosine[-1],
      "gradient_growth": signal.relative_gradient[0],
    }
  return {name: float(f"{value:.4g}") for name, value in numbers.items()}


def dimensions(images: ArrayLike) -> float:
  """Returns in how many dimensions images vary: tr(K)^2 / tr(K^2) of their covariance.

  Equally similar ones vary in one dimension less than there are images.
  """
  rows = np.asarray(images, np.float64).reshape(len(np.asarray(images)), -1)
  rows = rows - rows.mean(0)
  covariance = rows @ rows.T
  return float(np.trace(covariance) ** 2 / np.square(covariance).sum())


def _train(
  method: str, learning_rate: float
) -> tuple[dict[str, np.ndarray], float | None]:
  """Trains a network on digits; returns its signal by step and its test accuracy."""
  config = TrainConfig(
    method=method,
    depth=DEPTH,
    epochs=4,
    learning_rate=learning_rate,
    signal_every_steps=2,
  )
  with tempfile.TemporaryDirectory() as folder:
    result = train(config, folder)
    return read_signal(make_history(read_metrics(folder))), result.test_accuracy


def _trained_numbers(history: figures.SignalHistory) -> dict[str, float]:
  """Returns what the page says of a training: median over blocks, first and last."""
  numbers = {}
  for name in figures.SIGNAL_QUANTITIES:
    if name in history:
      for when, step in (("first", 0), ("last", -1)):
        sizes = np.abs(history[name][step])
        numbers[f"{name}_{when}"] = float(f"{np.median(sizes):.3g}")
        numbers[f"{name}_{when}_max"] = float(f"{sizes.max():.3g}")
  return numbers


if __name__ == "__main__":
  _WORKDIR = program.define_workdir("the pictures and concepts.json")
  program.run(lambda: main(pathlib.Path(_WORKDIR.value)))
