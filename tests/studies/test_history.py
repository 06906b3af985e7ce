"""What results keep of a run's metrics."""

import numpy as np

from skipinit_jax.studies.history import make_history, read_signal

CURVES = [
  {"step": 2, "kind": "train", "epoch": 1.0, "loss": 1.23456, "accuracy": 0.5},
  {"step": 2, "kind": "eval", "epoch": 1.0, "loss": 2.0, "accuracy": 0.4},
]


def signal_rows(num_steps, num_blocks):
  """Rows in which the value of block b at step s is s + b / 1000."""
  rows = []
  for step in range(num_steps):
    values = [step + (block + 1) / 1000 for block in range(num_blocks)]
    row = {"step": 7 * step, "kind": "signal", "epoch": step / 5}
    rows.append(row | dict.fromkeys(("branch_to_skip", "gradient_rms"), values))
  rows[0]["blocks"] = [f"block{index}" for index in range(num_blocks)]
  return rows


def test_curves():
  assert make_history(CURVES) == {
    "train": {"epoch": [1.0], "loss": [1.235], "accuracy": [0.5]},
    "test": {"epoch": [1.0], "loss": [2.0], "accuracy": [0.4]},
  }
  assert read_signal(make_history(CURVES)) == {}


def test_small_signal_is_whole():
  rows = signal_rows(3, 4)
  rows[1]["gradient_rms"] = [float("nan"), float("inf"), 0.0, 1e-30]
  for row in rows:
    row["alpha"] = [-0.12349, 0.0, 0.5, 1.0]
  history = make_history([rows[0], *CURVES, *rows[1:]])
  assert history["test"]["accuracy"] == [0.4]
  assert history["signal"]["alpha"] == ["-0.123 0 0.5 1"] * 3
  signal = read_signal(history)
  assert list(signal) == ["step", "block", "alpha", "branch_to_skip", "gradient_rms"]
  assert signal["step"].tolist() == [0, 7, 14]
  assert signal["block"].tolist() == [1, 2, 3, 4]
  np.testing.assert_allclose(
    signal["branch_to_skip"],
    [[step + block / 1000 for block in (1, 2, 3, 4)] for step in range(3)],
    rtol=5e-3,
  )
  np.testing.assert_array_equal(signal["gradient_rms"][1], [np.nan, np.inf, 0, 1e-30])


def test_large_signal_is_thinned_evenly():
  signal = read_signal(make_history(signal_rows(500, 1000)))
  assert list(signal) == ["step", "block", "branch_to_skip", "gradient_rms"]
  assert len(signal["step"]) == len(signal["block"]) == 48
  assert (signal["step"][0], signal["step"][-1]) == (0, 7 * 499)
  assert (signal["block"][0], signal["block"][-1]) == (1, 1000)
  for numbers, spacing in ((signal["step"], 7 * 499 / 47), (signal["block"], 999 / 47)):
    np.testing.assert_allclose(np.diff(numbers), spacing, atol=7)
  # The value that belongs to each of them.
  np.testing.assert_allclose(
    signal["gradient_rms"],
    signal["step"][:, None] / 7 + signal["block"] / 1000,
    rtol=5e-3,
  )
