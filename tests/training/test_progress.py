import io
import re
import time

import pytest

from skipinit_jax.training import progress as progress_lib
from skipinit_jax.training.progress import Progress
from tests.terminal import run_on_terminal, stop_clock


@pytest.fixture
def terminal(monkeypatch):
  """What a terminal's shell sets; a test process has no window to take it from."""
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def clock(monkeypatch):
  return stop_clock(monkeypatch, progress_lib)


def test_plain_lines(clock):
  stream = io.StringIO()
  with Progress(total_steps=1000, steps_per_epoch=100, stream=stream) as progress:
    # The steps before a resume took no time here.
    progress.update(100, 2.5, 0.125, 4321.0)
    clock[0] += 30
    progress.update(250, 1.25, 0.5, 4321.0)
    progress.message("saved")
    clock[0] += 150
    progress.update(1000, 0.5, 1.0, 12.0)
  assert stream.getvalue().splitlines() == [
    "step 100/1000, epoch 1/10, loss 2.5000, accuracy 12.5 %, 4,321 images/s, "
    "-:--:-- left",
    "step 250/1000, epoch 3/10, loss 1.2500, accuracy 50.0 %, 4,321 images/s, "
    "0:02:30 left",
    "saved",
    "step 1000/1000, epoch 10/10, loss 0.5000, accuracy 100.0 %, 12 images/s, "
    "0:00:00 left",
  ]


@pytest.mark.parametrize(
  ("steps", "seconds_a_step", "most"),
  [(50, 0.01, 2), (10_000, 1, 101), (300, 60, 101), (40, 1, 5)],
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


def test_no_control_characters_in_a_file(tmp_path, monkeypatch):
  for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):
    monkeypatch.setenv(variable, "1")
  with (
    open(tmp_path / "log", "w+") as stream,
    Progress(10, 5, stream=stream) as progress,
  ):
    progress.update(5, float("nan"), 0.1, 3.0)
    progress.message("[bold]brackets[/bold]")
  content = (tmp_path / "log").read_text()
  assert "loss nan" in content and "[bold]brackets[/bold]\n" in content
  assert all(c == "\n" or c.isprintable() for c in content)


@pytest.mark.usefixtures("terminal")
def test_live_bar():
  def run(stream):
    with Progress(total_steps=300, steps_per_epoch=100, stream=stream) as progress:
      progress.update(100, 1.5, 0.25, 1000.0)
      time.sleep(0.5)  # Two refreshes.
      progress.message("a line [that] stays")
      progress.update(300, float("nan"), 0.75, 2000.0)

  output = run_on_terminal(run)
  assert "\x1b[?25l" in output and output.count("\x1b[?25h") == 1
  assert "\x1b[2K" in output
  text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
  assert text.count("a line [that] stays\r\n") == 1
  assert "epoch 1/3, loss 1.5000, accuracy 25.0 %, 1,000 images/s, -:--:-- left" in text
  last = text.rstrip().splitlines()[-1]
  assert last.endswith(
    "epoch 3/3, loss nan, accuracy 75.0 %, 2,000 images/s, 0:00:00 left"
  )
  assert "━" in last and len(last.split("\r")[-1]) <= 80


@pytest.mark.usefixtures("terminal")
def test_bar_is_ended_by_an_error():
  def run(stream):
    with pytest.raises(KeyboardInterrupt), Progress(3, 1, stream=stream):
      raise KeyboardInterrupt

  assert run_on_terminal(run).count("\x1b[?25h") == 1


def test_dumb_terminal_gets_plain_lines(monkeypatch):
  monkeypatch.setenv("TERM", "dumb")

  def run(stream):
    with Progress(3, 1, stream=stream) as progress:
      progress.update(3, 1.0, 0.5, 1.0)

  output = run_on_terminal(run)
  assert output.startswith("step 3/3, epoch 3/3, ") and "\x1b" not in output


def test_disabled_shows_nothing():
  def run(stream):
    with Progress(3, 1, stream=stream, enabled=False) as progress:
      progress.update(3, 1.0, 0.5, 1.0)
      progress.message("hidden")

  assert run_on_terminal(run) == ""
  stream = io.StringIO()
  run(stream)
  assert stream.getvalue() == ""
