"""Files of a run: written as a whole, as JSON, and kept by a lock."""

import concurrent.futures
import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from typing import Any, Generic, Literal, TypeVar
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.files import (
  LOCK,
  LockedError,
  as_type,
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
  value = {
    "accuracy": np.float32(0.5),
    "loss": math.nan,
    "steps": jnp.int32(3),
    "rates": (1, np.inf),
    "diverged": True,
  }
  path.write_text("an older result")
  write_json(path, value)
  written = {
    "accuracy": 0.5,
    "loss": "NaN",
    "steps": 3,
    "rates": [1, "Infinity"],
    "diverged": True,
  }
  assert json.loads(path.read_text()) == written
  assert math.isnan(read_json(path)["loss"])
  assert read_json(path)["rates"] == [1, math.inf]
  with pytest.raises(TypeError):
    write_json(path, {"loss": object()})
  assert json.loads(path.read_text()) == written
  assert os.listdir(tmp_path) == ["result.json"]


Label = TypeVar("Label")


@dataclasses.dataclass
class Point(Generic[Label]):
  label: Label
  place: tuple[float, int]
  score: float | None
  kind: Literal["a", "b"] = "a"


@dataclasses.dataclass
class Points(Generic[Label]):
  points: list[Point[Label]]
  notes: dict[str, Any]


POINT = {"label": "x", "place": [1, 2], "score": 1}


def test_values_of_json_become_dataclasses():
  values = {"points": [POINT], "notes": {"any": [None]}}
  points = Points([Point("x", [1, 2], 1.0)], {"any": [None]})
  assert as_type(Points[str], values) == points


@pytest.mark.parametrize(
  "change",
  [
    {"score": "1"},
    {"score": True},
    {"score": 10**400},
    {"label": 1},
    {"label": None},
    {"kind": "c"},
    {"more": 1},
    {"label": dataclasses.MISSING},
  ],
)
def test_values_of_another_type_are_refused(change):
  fields = {**POINT, **change}
  point = {name: v for name, v in fields.items() if v is not dataclasses.MISSING}
  for values in ([point], point, None):
    with pytest.raises(ValueError, match="is not of type"):
      as_type(Points[str], {"points": values, "notes": {}})


def test_damaged_json(tmp_path):
  path = tmp_path / "result.json"
  with pytest.raises(UsageError, match=f"no file {path}"):
    read_json(path)
  for content in (b"", b"{", b"\xff"):
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"result\.json is damaged"):
      read_json(path)


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
  "address", ["s3://bucket/run", "gs://bucket/", "gs:///run", "gs://bucket/run#1"]
)
def test_address_that_is_no_folder(address):
  with pytest.raises(UsageError, match="it must be a directory, or a folder"):
    workdir_path(address)


def test_no_folder_called_gs_is_made():
  with pytest.raises(UsageError, match="here it must be a directory of this machine"):
    local_workdir("gs://bucket/study")


def test_a_second_lock_is_one_sentence(tmp_path):
  path = tmp_path / LOCK
  for _ in range(2):
    with lock(path), lock(tmp_path / "another"):
      assert is_locked(path)
      with pytest.raises(LockedError, match=f"^The workdir {tmp_path} is in use by"):
        lock(path)
    assert not is_locked(path)


def test_one_of_many_threads_gets_the_lock(tmp_path):
  count = 8
  barrier = threading.Barrier(count)

  def take(_):
    barrier.wait()
    try:
      held = lock(tmp_path / LOCK)
    except LockedError:
      barrier.wait()
      return "refused"
    barrier.wait()
    with held:
      return "held"

  with concurrent.futures.ThreadPoolExecutor(count) as pool:
    outcomes = sorted(pool.map(take, range(count)))
  assert outcomes == ["held"] + ["refused"] * (count - 1)
  assert not is_locked(tmp_path / LOCK)


def test_a_lock_ends_when_its_process_is_killed(tmp_path):
  path = tmp_path / LOCK
  # Children do not keep it.
  program = textwrap.dedent("""
    import subprocess, sys, time
    from skipinit_jax.files import lock
    held = lock(sys.argv[1])
    child = subprocess.Popen(["sleep", "600"], close_fds=False)
    print(child.pid, flush=True)
    time.sleep(600)
  """)
  command = [sys.executable, "-c", program, path]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
    child = int(holder.stdout.readline())
    try:
      assert is_locked(path)
      with pytest.raises(LockedError):
        lock(path)
      holder.kill()
      holder.wait()
      assert not is_locked(path)
      with lock(path):
        pass
    finally:
      holder.kill()
      os.kill(child, signal.SIGKILL)


def test_file_system_without_locks(tmp_path, monkeypatch):
  fcntl = pytest.importorskip("fcntl")
  error = OSError(errno.ENOLCK, "No locks available")
  monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=error))
  with lock(tmp_path / LOCK), lock(tmp_path / LOCK):
    assert is_locked(tmp_path / LOCK)
