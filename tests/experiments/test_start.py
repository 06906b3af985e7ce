"""What comes before a program: its streams, its signals, and what ends it otherwise."""

import errno
import os
import signal
import subprocess
import sys
import textwrap

import jax
import pytest

from experiments import program, start

# As `python -m` does it, without what a program imports then.
AS_A_PROGRAM = "import os, signal, sys; sys.argv[:] = ['-m']; import experiments\n"


def python(code, **options):
  return subprocess.run(
    [sys.executable, "-c", AS_A_PROGRAM + textwrap.dedent(code)],
    text=True,
    timeout=60,
    **options,
  )


@pytest.mark.parametrize(
  ("number", "status", "text"),
  [
    (signal.SIGTERM, program.INTERRUPTED_STATUS, start.INTERRUPTED),
    (signal.SIGINT, 128 + signal.SIGINT, start.STOPPED),
  ],
)
def test_signals_while_python_starts(number, status, text):
  done = python(f"os.kill(os.getpid(), {number})", capture_output=True)
  assert (done.returncode, done.stdout, done.stderr) == (status, f"{text}\n", "")


def test_a_variable_that_jax_refuses():
  environment = os.environ | {"JAX_ENABLE_X64": "banana"}
  done = python("", env=environment, capture_output=True)
  assert (done.returncode, done.stdout) == (program.USAGE_ERROR_STATUS, "")
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and "JAX_ENABLE_X64" in line


def test_closed_streams_are_opened(tmp_path):
  # What is opened next would otherwise be where libraries print.
  code = f"""
    print("out"), print("error", file=sys.stderr)
    assert os.open({str(tmp_path / "file")!r}, os.O_WRONLY | os.O_CREAT) > 2
    assert sys.stdin.read() == ""
    os._exit(7)
  """
  closed = python(code, preexec_fn=lambda: os.closerange(0, 3))
  assert closed.returncode == 7


def test_what_cannot_be_written_is_dropped():
  with open("/dev/full", "w") as full:
    output = start.Output(full)
    output.write("lost")
    output.flush()
    assert output.error.errno == errno.ENOSPC and output.is_full
    output.write("this too")
    output.flush()
  read, write = os.pipe()
  os.close(read)
  with os.fdopen(write, "w") as unread:
    output = start.Output(unread)
    output.write("unread")
    output.flush()
    assert output.error.errno == errno.EPIPE and not output.is_full


def test_help_that_cannot_be_written(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["program", "--help"])
  monkeypatch.setattr(signal, "signal", lambda *_: None)
  with open("/dev/full", "w") as full:
    monkeypatch.setattr(sys, "stdout", start.Output(full))
    with pytest.raises(SystemExit, match=str(program.USAGE_ERROR_STATUS)):
      program.run(lambda: None)


def test_what_ends_a_program_is_one_sentence(capfd, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  for call, sentence in (
    (lambda: jax.devices("nowhere"), "JAX_PLATFORMS is 'cuda'; set it to a platform"),
    (
      lambda: os.listdir("/dev/null/x"),
      "/dev/null/x cannot be used (Not a directory).",
    ),
  ):
    with pytest.raises((RuntimeError, OSError)) as caught:
      call()
    assert program._report(caught.value) == program.USAGE_ERROR_STATUS
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line
  assert program._report(RuntimeError("of the program itself")) is None
