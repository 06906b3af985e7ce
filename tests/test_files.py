"""Files of a run: written as a whole, as JSON, and kept by a lock."""

import errno
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.files import (
  LOCK,
  LockedError,
  full_disk_errors,
  is_locked,
  local_workdir,
  lock,
  read_json,
  workdir_path,
  write_json,
)

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_json(tmp_path):
  path = tmp_path / "result.json"
  path.write_text("an older result")
  write_json(
    path,
    {
      "accuracy": np.float32(0.5),
      "loss": math.nan,
      "steps": jnp.int32(3),
      "rates": (1, np.inf),
      "diverged": True,
      "nothing": None,
    },
  )
  assert json.loads(path.read_text()) == {
    "accuracy": 0.5,
    "loss": "NaN",
    "steps": 3,
    "rates": [1, "Infinity"],
    "diverged": True,
    "nothing": None,
  }
  assert math.isnan(read_json(path)["loss"])
  assert read_json(path)["rates"] == [1, math.inf]
  with pytest.raises(TypeError):
    write_json(path, {"loss": object()})
  assert json.loads(path.read_text())["steps"] == 3
  assert os.listdir(tmp_path) == ["result.json"]


def test_damaged_json(tmp_path):
  path = tmp_path / "result.json"
  with pytest.raises(UsageError, match=f"no file {path}"):
    read_json(path)
  for content in (b"", b"{", b"\xff"):
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"result\.json is damaged"):
      read_json(path)


def test_half_a_file_takes_no_space(tmp_path, monkeypatch):
  path = tmp_path / "result.json"
  write_json(path, {"step": 1})

  def write_half(self, content):
    with self.open("wb") as file:
      file.write(content[:3])
    raise NO_SPACE

  monkeypatch.setattr(pathlib.Path, "write_bytes", write_half)
  with pytest.raises(OSError, match="No space"):
    write_json(path, {"step": 2})
  assert read_json(path) == {"step": 1}
  assert os.listdir(tmp_path) == ["result.json"]


def test_only_a_full_disk_is_reported_as_one():
  full = r"/run cannot be written \(No space left"
  with pytest.raises(UsageError, match=full), full_disk_errors("/run"):
    raise NO_SPACE
  for error in (
    ValueError("unrelated"),
    PermissionError(errno.EACCES, "denied"),
    UsageError("Own."),
  ):
    with pytest.raises(type(error)) as caught, full_disk_errors("/run"):
      raise error
    assert caught.value is error


@pytest.mark.parametrize(
  "address",
  [
    "s3://bucket/run",
    "https://host/run",
    "gs://bucket",
    "gs://bucket/",
    "gs:///run",
    "gs://bucket/run#1",
    "gs://bucket/*",
  ],
)
def test_address_that_is_no_folder(address):
  with pytest.raises(UsageError, match="it must be a directory, or a folder"):
    workdir_path(address)


def test_no_folder_called_gs_is_made(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UsageError, match="here it must be a directory of this machine"):
    local_workdir("gs://bucket/study")
  assert os.listdir() == []


def test_a_second_lock_is_one_sentence(tmp_path):
  path = tmp_path / LOCK
  with lock(path):
    assert is_locked(path)
    with pytest.raises(LockedError) as error:
      lock(path)
    with lock(tmp_path / "another"):
      pass
  assert str(error.value) == (
    f"The workdir {tmp_path} is in use by another run: wait until that ends, or use "
    "another --workdir."
  )
  assert not is_locked(path)
  with lock(path):
    assert is_locked(path)


def test_one_of_many_threads_gets_the_lock(tmp_path):
  count = 8
  start, end = threading.Barrier(count), threading.Barrier(count)
  outcomes = []

  def take():
    start.wait()
    try:
      held = lock(tmp_path / LOCK)
      outcomes.append("held")
      end.wait()
      with held:
        pass
    except LockedError:
      outcomes.append("refused")
      end.wait()

  threads = [threading.Thread(target=take) for _ in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(outcomes) == ["held"] + ["refused"] * (count - 1)
  assert not is_locked(tmp_path / LOCK)


def test_a_lock_ends_when_its_process_is_killed(tmp_path):
  path = tmp_path / LOCK
  program = textwrap.dedent("""
    import subprocess, sys, time
    from skipinit_jax.files import lock
    held = lock(sys.argv[1])
    # Children do not keep it.
    sleep = "import time; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", sleep], close_fds=False)
    print(child.pid, flush=True)
    time.sleep(600)
  """)
  holder = subprocess.Popen(
    [sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True
  )
  child = int(holder.stdout.readline())
  try:
    assert is_locked(path)
    with pytest.raises(LockedError):
      lock(path)
  finally:
    holder.kill()
    holder.wait()
    holder.stdout.close()
  try:
    assert not is_locked(path)
    with lock(path):
      pass
  finally:
    os.kill(child, signal.SIGKILL)


def test_file_system_without_locks(tmp_path, monkeypatch):
  fcntl = pytest.importorskip("fcntl")

  def fail(*args):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(fcntl, "flock", fail)
  with lock(tmp_path / LOCK), lock(tmp_path / LOCK):
    assert is_locked(tmp_path / LOCK)
