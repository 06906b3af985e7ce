"""A terminal and a clock for tests of what programs show while they run."""

import os
import pty
import types


def run_on_terminal(run):
  """Returns what `run` writes to a real terminal of its own."""
  leader, follower = pty.openpty()
  with os.fdopen(follower, "w") as stream:
    run(stream)
  content = b""
  # The output is small enough for the terminal's buffer; its end is an error.
  while True:
    try:
      content += os.read(leader, 65536)
    except OSError:
      break
  os.close(leader)
  return content.decode()


def stop_clock(monkeypatch, module):
  """Gives a module a clock that stands still until its only element is changed."""
  now = [1000.0]
  monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
  return now
