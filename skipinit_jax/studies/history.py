"""What `results.json` keeps of a run's metrics: its learning curves and its signal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skipinit_jax.analysis.figures import SIGNAL_QUANTITIES

# A heat map in a figure of several has about as many pixels.
_MOST_CELLS = 48


def make_history(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """Returns the curves of a run.

  Args:
    rows: of its metrics, as `training.metrics.read_metrics` returns them.

  Returns:
    Columns of equal length: "train" (as trained on) and "test" have epoch, loss and
    accuracy. If the signal was logged, "signal" has the steps, the numbers of
    the blocks, from 1, and for each quantity a string at each step: numbers, block by
    block, between spaces. It is thinned evenly, to at most 48 steps and blocks; the
    first and the last are kept.
  """
  columns = ("epoch", "loss", "accuracy")
  curves = [row for row in rows if all(row.get(name) is not None for name in columns)]
  history: dict[str, dict[str, Any]] = {
    name: {
      column: [float(f"{row[column]:.4g}") for row in curves if row["kind"] == kind]
      for column in columns
    }
    for name, kind in (("train", "train"), ("test", "eval"))
  }
  signals = [row for row in rows if row["kind"] == "signal"]
  if signals:
    steps = _thin(len(signals))
    # The names of the blocks are in the run's first row alone, which may be lost.
    blocks = _thin(len(signals[0]["gradient_rms"]))
    history["signal"] = {
      "step": [signals[step]["step"] for step in steps],
      "block": [block + 1 for block in blocks],
      # As strings: a line of the file for each number would make it many times longer.
      **{
        name: [
          " ".join(f"{signals[step][name][block]:.3g}" for block in blocks)
          for step in steps
        ]
        for name in SIGNAL_QUANTITIES
        if name in signals[0]
      },
    }
  return history


def read_signal(history: Mapping[str, Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """Returns the signal that `make_history` kept, as `heat_map_figures` takes it.

  Returns:
    Arrays by name; none if the signal was not logged.
  """
  return {
    name: np.array(values)
    if name in ("step", "block")
    else np.array([line.split() for line in values], np.float64)
    for name, values in history.get("signal", {}).items()
  }


def _thin(count: int) -> list[int]:
  """Returns some of the numbers below a count: first, last, and evenly between."""
  chosen = np.linspace(0, count - 1, min(count, _MOST_CELLS)).round()
  return [int(index) for index in chosen]
