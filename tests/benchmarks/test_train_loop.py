"""Epochs are timed by the events that a run writes."""

import time

from benchmarks import train_loop
from skipinit_jax.training.metrics import MetricsWriter


def test_event_times_are_when_each_row_of_a_kind_was_written(tmp_path):
  around = []
  with MetricsWriter(tmp_path, resume_step=None) as writer:
    for step in range(3):
      around.append(time.time())
      writer.write(step, "train", {"loss": 1.0, "accuracy": 0.5})
      around.append(time.time())
      writer.write(step, "eval", {"loss": 2.0})
  times = train_loop.event_times(tmp_path / "tensorboard", "train/loss")
  assert len(times) == 3
  for time_of_row, begin, end in zip(times, around[::2], around[1::2], strict=True):
    assert begin <= time_of_row <= end
