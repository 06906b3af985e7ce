"""What a study shows of itself, on a terminal and in a log file."""

import io
import re
import time

import pytest

from skipinit_jax.studies import progress as progress_lib
from skipinit_jax.studies.progress import StudyProgress
from tests.studies.results import make_run, make_study, wanted
from tests.terminal import run_on_terminal, stop_clock


@pytest.fixture
def clock(monkeypatch):
  return stop_clock(monkeypatch, progress_lib)


@pytest.fixture
def study():
  return make_study(methods=("skipinit", "batch_norm"), rates=(0.25, 0.3), seeds=1)


@pytest.fixture
def keys(study):
  """SkipInit and batch norm at rate 2⁻², then both at 0.3."""
  return [key for _, key in wanted(study)]


def test_each_finished_trial_is_a_line(clock, study, keys):
  stream = io.StringIO()
  with StudyProgress(study, capacity=2, stream=stream) as progress:
    progress.update({}, keys, num_running=2)
    clock[0] += 100
    runs = {keys[0]: make_run(keys[0], 0.5)}
    progress.update(runs, keys[1:], num_running=1)
    progress.update(runs, keys[1:], num_running=2)
    clock[0] += 30
    runs[keys[1]] = make_run(keys[1], 0.25, seconds=30.0)
    runs[keys[2]] = make_run(keys[2], None, step=7, seconds=10.0)
    progress.update(runs, keys[3:], num_running=1)
    progress.message("something else")
    clock[0] += 3600
    runs[keys[3]] = make_run(keys[3], 0.75, seconds=40.0)
    progress.update(runs, [], num_running=0)
  # The other networks are taken to be like the first one: 3 runs of 90 s on 2 workers.
  # Then the only one left is like that of its own network.
  assert stream.getvalue().splitlines() == [
    "[1 done, 1 running, 2 left, 0:01:40 passed, about 0:02:15 left] "
    "MLP 2-8, skipinit, rate 2⁻², seed 0: 50.0 %, best 50.0 % at 2⁻²",
    "[3 done, 1 running, 0 left, 0:02:10 passed, about 0:00:15 left] "
    "MLP 2-8, batch_norm, rate 2⁻², seed 0: 25.0 %, best 25.0 % at 2⁻²",
    "[3 done, 1 running, 0 left, 0:02:10 passed, about 0:00:15 left] "
    "MLP 2-8, skipinit, rate 0.3, seed 0: diverged at step 7, best 50.0 % at 2⁻²",
    "something else",
    "[4 done, 0 running, 0 left, 1:02:10 passed, 0:00:00 left] "
    "MLP 2-8, batch_norm, rate 0.3, seed 0: 75.0 %, best 75.0 % at 0.3",
  ]


def test_a_resumed_study_repeats_no_line(clock, study, keys):
  stream = io.StringIO()
  with StudyProgress(study, capacity=1, stream=stream) as progress:
    runs = {key: make_run(key) for key in keys[:2]}
    progress.update(runs, keys[2:], num_running=1)
    progress.update(runs, keys[2:], num_running=1)
  assert stream.getvalue() == "2 trials are done already.\n"


def test_no_control_characters_in_a_file(tmp_path, monkeypatch, study, keys):
  monkeypatch.setenv("FORCE_COLOR", "1")
  monkeypatch.setenv("TTY_COMPATIBLE", "1")
  path = tmp_path / "log"
  with (
    path.open("w") as stream,
    StudyProgress(study, capacity=2, stream=stream) as progress,
  ):
    progress.update({}, keys, num_running=2)
    # A file that someone follows has the line at once.
    progress.message("[bold]brackets[/bold]")
    assert path.read_text() == "[bold]brackets[/bold]\n"
    progress.update({keys[0]: make_run(keys[0])}, keys[1:], num_running=1)
  content = path.read_text()
  assert content.count("\n") == 2
  assert all(c == "\n" or c.isprintable() for c in content)


def test_live_bar(monkeypatch, study, keys):
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "100")

  def run(stream):
    with StudyProgress(study, capacity=2, stream=stream) as progress:
      progress.update({}, keys, num_running=2)
      time.sleep(0.5)  # Two refreshes.
      progress.message("a line [that] stays")
      progress.update({key: make_run(key) for key in keys[:3]}, keys[3:], num_running=1)

  output = run_on_terminal(run)
  text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
  assert text.count("a line [that] stays\r\n") == 1
  assert "0 done, 2 running, 2 left, 0:00:00 passed" in text
  assert text.count("seed 0: 50.0 %, best 50.0 % at ") == 3
  last = text.rstrip().splitlines()[-1].split("\r")[-1]
  assert "━ 3 done, 1 running, 0 left, 0:00:0" in last
  assert len(last) <= 100
