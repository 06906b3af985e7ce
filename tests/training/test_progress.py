import io
import re

import pytest

from skipinit_jax.training import progress as progress_lib
from skipinit_jax.training.progress import Progress
from tests.terminal import run_on_terminal, stop_clock


@pytest.fixture
def clock(monkeypatch):
  return stop_clock(monkeypatch, progress_lib)


def test_plain_lines(clock):
  stream = io.StringIO()
  with Progress(total_steps=1000, steps_per_epoch=100, stream=stream) as progress:
    # The steps before a resume took no time here.
    progress.update(100, float("nan"), 0.125, 4321.0)
    clock[0] += 30
    progress.update(250, 1.25, 0.5, 4321.0)
    progress.message("[bold]saved[/bold]")
  assert stream.getvalue().splitlines() == [
    "step 100/1000, epoch 1/10, loss nan, accuracy 12.5 %, 4,321 images/s, "
    "-:--:-- left",
    "step 250/1000, epoch 3/10, loss 1.2500, accuracy 50.0 %, 4,321 images/s, "
    "0:02:30 left",
    "[bold]saved[/bold]",
  ]


@pytest.mark.parametrize(
  ("steps", "seconds_a_step", "most"),
  [(50, 0.01, 2), (10_000, 1, 101), (300, 60, 101)],
)
def test_plain_log_stays_short(clock, steps, seconds_a_step, most):
  stream = io.StringIO()
  with Progress(steps, steps_per_epoch=10, stream=stream) as progress:
    for step in range(1, steps + 1):
      clock[0] += seconds_a_step
      progress.update(step, 1.0, 0.5, 1.0)
  lines = stream.getvalue().splitlines()
  assert most / 2 <= len(lines) <= most
  assert lines[0].startswith("step 1/") and lines[-1].startswith(f"step {steps}/")


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_terminal(term, monkeypatch):
  monkeypatch.setenv("TERM", term)
  monkeypatch.setenv("COLUMNS", "80")

  def run(stream):
    with (
      pytest.raises(KeyboardInterrupt),
      Progress(total_steps=300, steps_per_epoch=100, stream=stream) as progress,
    ):
      progress.message("a line [that] stays")
      progress.update(300, float("nan"), 0.75, 2000.0)
      raise KeyboardInterrupt

  output = run_on_terminal(run)
  # Only a live bar moves the cursor, and it is ended by an error too.
  assert output.count("\x1b[?25h") == (term != "dumb")
  text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
  assert text.count("a line [that] stays\r\n") == 1
  assert "epoch 3/3, loss nan, accuracy 75.0 %, 2,000 images/s" in text
  assert ("━" in text) == (term != "dumb")
