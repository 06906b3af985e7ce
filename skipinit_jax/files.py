"""Where the files of a run are, and how they are written.

A workdir is a directory of a file system, or a folder of one of Google's buckets. The
constants here name what a run's workdir holds.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import filelock
from etils import epath

from skipinit_jax.errors import UsageError

Path: TypeAlias = pathlib.Path | epath.Path
"""A path in a file system, or in a bucket."""

CONFIG = "config.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
LOCK = "lock"

_FOLDER = re.compile(r"gs://(?P<bucket>[a-z0-9][\w.-]+)/[^?#*\[\]]*[^?#*\[\]/]/?")
_SECONDS = 10.0
# JSON has no such numbers: the strings are those of protocol buffers' JSON format,
# and Python's own `float` reads them.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# What the system says of a full disk. The last one is for a limit on the size of a
# file, as by `ulimit -f`.
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))
# Some network file systems have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def workdir_path(workdir: str | os.PathLike[str]) -> Path:
  """Returns a workdir as a path: an `epath.Path` if it is in a bucket.

  Both have the same methods. But a bucket has no locks, knows a folder only by its
  files, and takes a file as a whole: nothing can be appended to it or renamed.

  Args:
    workdir: a directory, or gs://BUCKET/FOLDER, neither of which needs to exist.

  Raises:
    UsageError: it is another address, or the bucket cannot be used.
  """
  address = os.fspath(workdir)
  if "://" not in address:
    return pathlib.Path(workdir).absolute()
  match = _FOLDER.fullmatch(address)
  if match is None:
    raise UsageError(
      f"The workdir {address} cannot be used: it must be a directory, or a folder of a "
      "bucket, gs://BUCKET/FOLDER."
    )
  try:
    _check_bucket(match["bucket"])
  except UsageError as error:
    raise UsageError(f"The workdir {address} cannot be used: {error}") from None
  return epath.Path(address)


def in_bucket(path: Path) -> bool:
  """Tells whether a path that `workdir_path` returned is in a bucket."""
  return not isinstance(path, pathlib.Path)


def local_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a workdir as an absolute path, for what needs a file system.

  Raises:
    UsageError: it is an address.
  """
  if "://" in os.fspath(workdir):
    raise UsageError(
      f"The workdir {workdir} is an address: here it must be a directory of this "
      "machine or one mounted on it."
    )
  return pathlib.Path(workdir).absolute()


def write_file(path: Path, content: bytes) -> None:
  """Writes a file that is never seen half-written.

  Args:
    path: the file, as `workdir_path` returns it; replaced if it exists.
  """
  if in_bucket(path):
    path.write_bytes(content)
    return
  # Two processes may write it at the same time.
  unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
  except OSError:
    # On a full disk, half a file would take space that others need.
    unfinished.unlink(missing_ok=True)
    raise


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
  """Writes a JSON file that is never seen half-written.

  Args:
    path: the file, replaced if it exists.
    obj: nested dicts, lists and tuples of strings, numbers (NumPy's and JAX's too),
      booleans and None. Non-finite numbers become the strings "NaN", "Infinity" and
      "-Infinity".
  """
  text = json.dumps(to_json(obj), indent=2, allow_nan=False) + "\n"
  write_file(workdir_path(path), text.encode())


def to_json(obj: Any) -> Any:
  """Returns `obj` as the plain values that its JSON file holds.

  Returns:
    Dicts, lists, strings, finite numbers, booleans and None.
  """
  if isinstance(obj, Mapping):
    return {str(key): to_json(value) for key, value in obj.items()}
  if isinstance(obj, list | tuple):
    return [to_json(value) for value in obj]
  if hasattr(obj, "item"):
    obj = obj.item()
  if isinstance(obj, float) and not math.isfinite(obj):
    return "NaN" if math.isnan(obj) else "Infinity" if obj > 0 else "-Infinity"
  return obj


def from_json(value: Any) -> Any:
  """Returns the values that `to_json` took, tuples as lists.

  Args:
    value: dicts, lists, strings, numbers, booleans and None.
  """
  if isinstance(value, dict):
    return {key: from_json(item) for key, item in value.items()}
  if isinstance(value, list):
    return [from_json(item) for item in value]
  return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def as_type(kind: Any, value: Any) -> Any:
  """Returns a value of JSON as a type, such as a dataclass from its fields.

  Args:
    kind: a dataclass, str, int, float, bool, None, Any or Literal, or a list, dict or
      union of these. Other types are not checked.

  Raises:
    ValueError: the value is of another type, or lacks a field or has one too many.
  """
  origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
  has_fields = dataclasses.is_dataclass(origin)
  if origin in (typing.Union, types.UnionType):
    for each in arguments:
      with contextlib.suppress(ValueError):
        return as_type(each, value)
  elif has_fields:
    hints, required = _fields(origin, arguments)
    if isinstance(value, dict) and required <= value.keys() <= hints.keys():
      return origin(**{name: as_type(hints[name], value[name]) for name in value})
  elif origin is list and arguments and isinstance(value, list):
    return [as_type(arguments[0], each) for each in value]
  elif origin is dict and arguments and isinstance(value, dict):
    return {key: as_type(arguments[1], each) for key, each in value.items()}
  elif origin is float and type(value) in (float, int):
    with contextlib.suppress(OverflowError):
      return float(value)
  elif origin in (str, int, bool, list, dict, types.NoneType):
    # To Python, True is a whole number too.
    if type(value) is origin:
      return value
  elif origin is not float and (origin is not typing.Literal or value in arguments):
    return value
  raise ValueError(f"{str(value)[:40]!r} is not of type {kind}")


@functools.cache
def _fields(kind: Any, arguments: Any) -> tuple[dict[str, Any], set[str]]:
  """Returns the types of a dataclass's fields, and those that have no default."""
  variables = dict(zip(getattr(kind, "__parameters__", ()), arguments, strict=False))
  hints, required = {}, set()
  for name, hint in typing.get_type_hints(kind).items():
    bound = hint[arguments] if getattr(hint, "__parameters__", ()) else hint
    hints[name] = variables.get(hint, bound)
  for field in dataclasses.fields(kind):
    if field.default is field.default_factory is dataclasses.MISSING:
      required.add(field.name)
  return hints, required


def read_json(path: str | os.PathLike[str]) -> Any:
  """Reads what `write_json` wrote.

  Returns:
    The values, with non-finite numbers as floats again, and tuples as lists.

  Raises:
    UsageError: the file does not exist or is damaged.
  """
  try:
    return from_json(json.loads(workdir_path(path).read_bytes()))
  except FileNotFoundError:
    raise UsageError(f"There is no file {path}.") from None
  except ValueError:
    raise UsageError(f"The file {path} is damaged: it holds no JSON.") from None


class LockedError(UsageError):
  """What a lock stands for is in use."""


def lock(path: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Any]:
  """Locks a file, so that one process at a time uses what it stands for.

  The lock ends with the returned context, and with the process however that ends. The
  file stays.

  Args:
    path: the file, in an existing directory.

  Raises:
    LockedError: another process or thread holds the lock.
  """
  try:
    # Whoever closes a run may be another thread than the one that opened it.
    return filelock.FileLock(path, thread_local=False).acquire(timeout=0)
  except filelock.Timeout:
    raise LockedError(
      f"The workdir {os.path.dirname(path)} is in use by another run: wait until "
      "that ends, or use another --workdir."
    ) from None
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    return contextlib.nullcontext()


def is_locked(path: str | os.PathLike[str]) -> bool:
  """Tells whether a `lock` is held; where that cannot be known, that it is."""
  try:
    with filelock.FileLock(path).acquire(timeout=0):
      return False
  except OSError:
    return True


@contextlib.contextmanager
def full_disk_errors(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Makes a full disk's error in the block a `UsageError` that says how to go on.

  Args:
    workdir: the run's directory, to which the block writes.
  """
  try:
    yield
  except UsageError:
    raise
  except (OSError, ValueError) as error:
    # TensorStore, which writes the arrays of checkpoints, has the system's reason in
    # the text of a ValueError.
    reason = next((reason for reason in _FULL if reason in str(error)), None)
    if reason is None:
      raise
    raise UsageError(
      f"The workdir {workdir} cannot be written ({reason}): make space, and the same "
      "command goes on from the last checkpoint."
    ) from error


@functools.cache
def _check_bucket(name: str) -> None:
  """Asks for a bucket once, because libraries try for minutes what cannot work."""
  try:
    import fsspec
    import gcsfs  # noqa: F401
    import requests
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage
  except ImportError:
    raise UsageError(
      "install the extra `gcs` for buckets (pip install --editable '.[gcs]'), or name "
      "a directory as --workdir."
    ) from None
  # TensorStore writes files too, which a remembered list would not have.
  fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
  try:
    # Orbax, too, asks for the bucket when it removes checkpoints.
    storage.Client().get_bucket(name, timeout=_SECONDS, retry=None)
  except exceptions.NotFound:
    raise UsageError(f"there is no bucket {name}; use another --workdir.") from None
  except (exceptions.Forbidden, exceptions.Unauthorized):
    raise UsageError(
      f"the credentials here do not allow to read bucket {name}: they need the roles "
      "Storage Object Admin and Storage Legacy Bucket Reader."
    ) from None
  except GoogleAuthError:
    raise UsageError(
      "there are no valid credentials for Google Cloud: run `gcloud auth "
      "application-default login`, or name a directory as --workdir."
    ) from None
  except requests.RequestException:
    raise UsageError(
      "Google Cloud Storage cannot be reached; check the network, or name a directory "
      "as --workdir."
    ) from None
  except (exceptions.GoogleAPIError, OSError) as error:
    # An OSError says that no project is set.
    reason = str(error).splitlines()[0].rstrip(".")
    raise UsageError(f"{reason}; check bucket {name} and your account.") from None
