"""What `results.json` keeps of a run's metrics: its learning curves and its signal."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from skipinit_jax.analysis.figures import SIGNAL_QUANTITIES

# A heat map in a figure of several has about as many pixels.
_MOST_CELLS = 48
_CURVE = ("epoch", "loss", "accuracy")


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
  curves = [row for row in rows if all(_is_number(row.get(name)) for name in _CURVE)]
  history: dict[str, dict[str, Any]] = {
    name: {
      column: [float(f"{row[column]:.4g}") for row in curves if row["kind"] == kind]
      for column in _CURVE
    }
    for name, kind in (("train", "train"), ("test", "eval"))
  }
  signals = [row for row in rows if row["kind"] == "signal"]
  names = [name for name in SIGNAL_QUANTITIES if signals and name in signals[0]]
  # The names of the blocks are in the run's first row alone, which may be lost.
  count = np.size(signals[0][names[0]]) if names else 0
  signals = [row for row in signals if _has_lists(row, names, count)]
  if names and signals:
    steps = _thin(len(signals))
    blocks = _thin(count)
    history["signal"] = {
      "step": [signals[step]["step"] for step in steps],
      "block": [block + 1 for block in blocks],
      # As strings: a line of the file for each number would make it many times longer.
      **{
        name: [
          " ".join(f"{signals[step][name][block]:.3g}" for block in blocks)
          for step in steps
        ]
        for name in names
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


def check_history(history: Mapping[str, Mapping[str, Any]]) -> None:
  """Raises a ValueError if a history is none that `make_history` makes."""
  try:
    for name in ("train", "test"):
      columns = np.array([history[name][column] for column in _CURVE])
      if columns.dtype.kind not in "fiu" or not np.isfinite(columns[0]).all():
        raise ValueError
    signal = read_signal(history)
    if signal:
      shape = signal["step"].shape + signal["block"].shape
      for name in signal.keys() - {"step", "block"}:
        if signal[name].shape != shape or name not in SIGNAL_QUANTITIES:
          raise ValueError
  except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
    raise ValueError("its history is not one of curves and signals") from None


def _has_lists(row: Mapping[str, Any], names: Sequence[str], count: int) -> bool:
  lists = [row.get(name) for name in names]
  return all(
    isinstance(each, list) and len(each) == count and all(map(_is_number, each))
    for each in lists
  )


def _is_number(value: Any) -> bool:
  return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _thin(count: int) -> list[int]:
  """Returns some of the numbers below a count: first, last, and evenly between."""
  chosen = np.linspace(0, count - 1, min(count, _MOST_CELLS)).round()
  return [int(index) for index in chosen]
