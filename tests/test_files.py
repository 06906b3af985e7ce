"""Files of a run: written as a whole, as JSON, and kept by a lock."""

import dataclasses
import errno
import json
import math
import os
import pathlib
from typing import Any, Generic, Literal, TypeVar
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax import data, export, files
from skipinit_jax.data import prepared
from skipinit_jax.errors import UsageError
from skipinit_jax.files import (
  LOCK,
  LockedError,
  as_type,
  cache_path,
  is_locked,
  local_workdir,
  lock,
  read_json,
  reading_record,
  remove_unfinished,
  workdir_errors,
  workdir_path,
  write_json,
)
from skipinit_jax.studies import storage
from skipinit_jax.training import TrainConfig

NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_home_means_the_same_everywhere(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
  monkeypatch.setenv("TFDS_DATA_DIR", "~/sets")
  assert files.workdir_path("~/run") == files.local_workdir("~/run") == tmp_path / "run"
  assert files.cache_path("x") == tmp_path / "cache" / "skipinit_jax" / "x"
  assert prepared.directory(None) == str(tmp_path / "sets")
  assert prepared.directory("~/own") == str(tmp_path / "own")
  assert prepared.directory("gs://bucket/~") == "gs://bucket/~"
  with pytest.raises(UsageError, match=f"not prepared in {tmp_path / 'own'}"):
    TrainConfig(dataset="cifar10", data_dir="~/own").load_dataset()
  export.save_safetensors("~/weights", {"params": {"w": np.ones(2)}})
  assert (tmp_path / "weights").exists()
  assert export.load_safetensors("~/weights")["params"]["w"].sum() == 2
  data.load("digits", cache_dir="~/arrays")
  assert (tmp_path / "arrays" / "digits.npz").exists()
  files.write_json("~/a.json", [1])
  assert files.read_json(tmp_path / "a.json") == [1]
  assert storage.default_url("~/run").endswith(f"{tmp_path}/run/study.db")


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
    with pytest.raises(ValueError, match=r"is not of type|is missing|is no field"):
      as_type(Points[str], {"points": values, "notes": {}})


def test_damaged_json(tmp_path):
  path = tmp_path / "result.json"
  with pytest.raises(UsageError, match=f"no file {path}"):
    read_json(path)
  for content in (b"", b"{", b"\xff", b"1e999", b"NaN", b"[" * 10**5):
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"result\.json is damaged"):
      read_json(path)
    with (
      pytest.raises(UsageError, match="the same command makes it again"),
      reading_record(path),
    ):
      pass
  path.unlink()
  path.mkdir()
  with pytest.raises(UsageError, match=r"result\.json: a directory is there"):
    read_json(path)
  with pytest.raises(IsADirectoryError) as caught:
    write_json(path, {})
  # Not that of the unfinished file, which nobody knows.
  assert caught.value.filename == str(path) and [*tmp_path.iterdir()] == [path]


def test_what_the_system_says_is_one_sentence():
  tensorstore = ValueError("Failed to write 9 bytes [os_error_code='27']")
  for error, reason in (
    (NO_SPACE, r"\(No space left .*\): make space,"),
    (tensorstore, r"\(File too large\): make space,"),
    (PermissionError(errno.EACCES, "denied", "lock"), r"\(.* denied: lock\): mend"),
  ):
    with pytest.raises(UsageError, match=reason), workdir_errors("/run"):
      raise error
  for other in (ValueError("unrelated"), UsageError("Own.")):
    with pytest.raises(type(other)) as caught, workdir_errors("/run"):
      raise other
    assert caught.value is other


def test_what_cannot_be_read_is_not_damaged(tmp_path, monkeypatch):
  path = tmp_path / "result.json"
  write_json(path, {})
  error = OSError(errno.EIO, "Input/output error")
  monkeypatch.setattr(pathlib.Path, "read_bytes", mock.Mock(side_effect=error))
  with pytest.raises(UsageError, match=r"\(Input/output error\): it may be intact"):
    read_json(path)


def test_a_name_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
  with pytest.raises(UsageError, match="not UTF-8"):
    workdir_path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
  removed = tmp_path / "removed"
  removed.mkdir()
  monkeypatch.chdir(removed)
  removed.rmdir()
  with pytest.raises(UsageError, match="current directory, which was removed"):
    workdir_path("run")
  assert workdir_path(tmp_path) == tmp_path


def test_no_cache_without_a_home(monkeypatch):
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv("HOME", "/home/one")
  assert cache_path("data") == pathlib.Path("/home/one/.cache/skipinit_jax/data")
  monkeypatch.setattr(os.path, "expanduser", lambda path: path)
  assert cache_path("data") is None
  with pytest.raises(UsageError, match=r"^~/run is in your home, and you have none"):
    workdir_path("~/run")


def test_what_killed_writers_left_goes(tmp_path):
  path, other = tmp_path / "run[1].json", tmp_path / "run1.json.7.tmp"
  old, new = (tmp_path / f"run[1].json.{number}.tmp" for number in (1, 2))
  for file in (old, new, other):
    file.touch()
  os.utime(old, (0, 0))
  write_json(path, {})
  assert {*tmp_path.iterdir()} == {path, new, other}
  remove_unfinished(path)
  assert {*tmp_path.iterdir()} == {path, other}


@pytest.mark.parametrize(
  "address", ["s3://bucket/run", "gs://bucket/", "gs:///run", "gs://bucket/run#1"]
)
def test_address_that_is_no_folder(address):
  with pytest.raises(UsageError, match="it must be a directory, or a folder"):
    workdir_path(address)
  with pytest.raises(UsageError, match="here it must be a directory of this machine"):
    local_workdir(address)


def test_a_second_lock_is_one_sentence(tmp_path):
  path = tmp_path / LOCK
  for _ in range(2):
    with lock(path), lock(tmp_path / "another"):
      assert is_locked(path)
      with pytest.raises(LockedError, match=f"^The workdir {tmp_path} is in use by"):
        lock(path)
    assert not is_locked(path)


def test_file_system_without_locks(tmp_path, monkeypatch):
  fcntl = pytest.importorskip("fcntl")
  error = OSError(errno.ENOLCK, "No locks available")
  monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=error))
  with lock(tmp_path / LOCK), lock(tmp_path / LOCK):
    assert is_locked(tmp_path / LOCK)
