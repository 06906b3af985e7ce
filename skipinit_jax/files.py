"""Where the files of a run are, and how they are written.

A workdir is a directory of a file system, or a folder of one of Google's buckets. The
constants here name what a run's workdir holds.
"""

import contextlib
import dataclasses
import errno
import functools
import glob
import json
import math
import os
import pathlib
import re
import time
import types
import typing
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np

from skipinit_jax.errors import UsageError, extra

if TYPE_CHECKING:
  from etils import epath

Path: TypeAlias = Union[pathlib.Path, "epath.Path"]
"""A path in a file system, or in a bucket."""

CONFIG = "config.json"
RECORD = "record.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
PROFILE = "profile"
CHECKPOINTS = "checkpoints"
LOCK = "lock"

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What the system raises where there is no file of a name."""

# A file system's limit is 255 bytes, and searches add to a method's name.
_MOST_BYTES, _MOST_LETTERS = 200, 200
_FOLDER = re.compile(r"gs://(?P<bucket>[a-z0-9][\w.-]+)/[^?#*\[\]]*[^?#*\[\]/]/?")
_SECONDS = 10.0
# JSON has no such numbers: the strings are those of protocol buffers' JSON format,
# and Python's own `float` reads them.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# What JSON and arrays can hold: fractions and NumPy's longest numbers are none.
_TAKEN = {
  int: (int, np.integer),
  float: (float, int, np.integer, np.float16, np.float32),
}

# The last one is for a limit on the size of a file, as by `ulimit -f`.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Some network file systems have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# What a killed process was writing so long ago, nobody is writing any more.
_ABANDONED_SECONDS = 3600.0


def local_path(path: str | os.PathLike[str]) -> pathlib.Path:
  """Returns a path, in which a ~ at the start is the user's home.

  Shells leave the ~ of a flag or a variable alone, and Python that of a text.

  Raises:
    UsageError: the user has no home.
  """
  # Unlike `Path.expanduser`, without an error where there is no user of a name.
  expanded = pathlib.Path(os.path.expanduser(path))
  if expanded.parts[:1] == ("~",):
    raise UsageError(
      f"{path} is in your home, and you have none: set HOME, or name it in full."
    )
  return expanded


def workdir_path(workdir: str | os.PathLike[str], what: str = "workdir") -> Path:
  """Returns a workdir as a path: an `epath.Path` if it is in a bucket.

  Both have the same methods. But a bucket has no locks, knows a folder only by its
  files, and takes a file as a whole: nothing can be appended to it or renamed.

  Args:
    workdir: a directory, or gs://BUCKET/FOLDER, neither of which needs to exist.
    what: what it is to the user.

  Raises:
    UsageError: it is another address, or the bucket cannot be used.
  """
  address = os.fspath(workdir)
  if "://" not in address:
    return local_workdir(workdir, what)
  match = _FOLDER.fullmatch(address)
  if match is None:
    raise UsageError(
      f"The {what} {address} cannot be used: it must be a directory, or a folder of a "
      "bucket, gs://BUCKET/FOLDER."
    )
  try:
    _check_bucket(match["bucket"])
  except UsageError as error:
    raise UsageError(f"The {what} {address} cannot be used: {error}") from None
  from etils import epath

  return epath.Path(address)


def in_bucket(path: Path) -> bool:
  """Tells whether a path that `workdir_path` returned is in a bucket."""
  return not isinstance(path, pathlib.Path)


def local_workdir(
  workdir: str | os.PathLike[str], what: str = "workdir"
) -> pathlib.Path:
  """Returns a workdir as an absolute path, for what needs a file system.

  Raises:
    UsageError: it is an address, its name is not UTF-8, or it is relative to a
      directory that was removed.
  """
  if "://" in os.fspath(workdir):
    raise UsageError(
      f"The {what} {workdir} is an address: here it must be a directory of this "
      "machine or one mounted on it."
    )
  try:
    path = local_path(workdir).absolute()
  except FileNotFoundError:
    raise UsageError(
      f"The {what} {workdir} is relative to the current directory, which was removed: "
      "name it in full."
    ) from None
  try:
    # TensorStore, which writes the arrays of checkpoints, can write to no other.
    os.fspath(path).encode()
  except UnicodeEncodeError:
    raise UsageError(
      f"The {what} {os.fspath(path)!r} is not UTF-8: use another one."
    ) from None
  return path


def cache_path(*names: str) -> pathlib.Path | None:
  """Returns a path in this package's cache folder.

  Returns:
    That below $XDG_CACHE_HOME or ~/.cache, which need not exist; None where neither is
    known, as for a user without a home.
  """
  base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
  with contextlib.suppress(UsageError):
    base = local_path(base)
  return base.joinpath("skipinit_jax", *names) if base.is_absolute() else None


def check_name(kind: str, name: Any) -> None:
  """Raises a UsageError unless a name can be that of a folder.

  Args:
    kind: what it names, such as "method".
  """
  check_title(f"name of a {kind}", name)
  if re.search(r"^\.|[/\\]", name) or len(name.encode()) > _MOST_BYTES:
    raise UsageError(
      f"The name of a {kind} is {name!r}: folders are called by it, so it must not "
      f"begin with a dot, have a slash, or be longer than {_MOST_BYTES} bytes."
    )


def check_title(what: str, title: Any) -> None:
  """Raises a UsageError unless a title is one line that every table and figure shows.

  Args:
    what: what it is, such as "title of a method".
  """
  # Figures leave out lines whose names begin with an underscore.
  if not (
    isinstance(title, str)
    and title.isprintable()
    and 0 < len(title.strip()) == len(title) <= _MOST_LETTERS
    and not title.startswith("_")
  ):
    raise UsageError(
      f"The {what} is {title!r}: it must be one line of 1 to {_MOST_LETTERS} letters, "
      "without spaces around it or an underscore in front."
    )


def make_directory(workdir: Path) -> None:
  """Makes a directory of a run or study unless it is there.

  Args:
    workdir: as `workdir_path` returns it; a folder of a bucket needs none.

  Raises:
    UsageError: it cannot be made, read or written.
  """
  if in_bucket(workdir):
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not os.access(workdir, os.R_OK | os.W_OK | os.X_OK):
      raise PermissionError(None, "Permission denied")
  except OSError as error:
    raise UsageError(
      f"The workdir {workdir} cannot be written ({error.strerror}): use another "
      "--workdir."
    ) from error


def write_file(path: Path, content: bytes, *, mode: int | None = None) -> None:
  """Writes a file that is never seen half-written.

  Args:
    path: the file, as `workdir_path` returns it; replaced if it exists.
    mode: its permissions in a file system; None: as the process makes files.
  """
  if in_bucket(path):
    path.write_bytes(content)
    return
  # Two processes may write it at the same time.
  unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  remove_unfinished(path, _ABANDONED_SECONDS)
  try:
    unfinished.write_bytes(content)
    if mode is not None:
      unfinished.chmod(mode)
    os.replace(unfinished, path)
  except BaseException as error:
    # On a full disk, half a file would take space that others need.
    with contextlib.suppress(OSError):
      unfinished.unlink()
    if isinstance(error, OSError):
      error.filename, error.filename2 = os.fspath(path), None
    raise


def remove_unfinished(path: Path, seconds: float = 0.0) -> None:
  """Removes what killed processes have left of a file that `write_file` writes.

  Args:
    seconds: how long ago they must have written it.
  """
  for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
    # Another process may remove it too.
    with contextlib.suppress(OSError):
      if time.time() - left.stat().st_mtime >= seconds:
        left.unlink()


def write_json(
  path: str | os.PathLike[str], obj: Any, *, indent: int | None = 2
) -> None:
  """Writes a JSON file that is never seen half-written.

  Args:
    path: the file, replaced if it exists.
    obj: nested dicts, lists and tuples of strings, numbers (NumPy's and JAX's too),
      booleans and None. Non-finite numbers become the strings "NaN", "Infinity" and
      "-Infinity".
    indent: spaces of each level; None: all is one line, which is half as large.
  """
  separators = (",", ":") if indent is None else None
  text = json.dumps(to_json(obj), indent=indent, separators=separators, allow_nan=False)
  write_file(workdir_path(path), f"{text}\n".encode())


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
      union of these; or a tuple of equal types, which becomes a list. Other types are
      not checked.
    value: of JSON, or with tuples and NumPy's numbers in it.

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
    if isinstance(value, dict):
      if missing := required - value.keys():
        raise ValueError(f"the field {min(missing)} is missing")
      if unknown := value.keys() - hints.keys():
        raise ValueError(f"there is no field {min(unknown)!r}")
      return origin(**{name: as_type(hints[name], value[name]) for name in value})
  elif origin in (list, tuple) and arguments and isinstance(value, list | tuple):
    return [as_type(arguments[0], each) for each in value]
  elif origin is dict and arguments and isinstance(value, dict):
    return {key: as_type(arguments[1], each) for key, each in value.items()}
  elif origin in (str, int, float, bool, list, tuple, dict, types.NoneType):
    # To Python, True is a whole number too.
    if isinstance(value, _TAKEN.get(origin, origin)) and (
      origin is bool or not isinstance(value, bool)
    ):
      with contextlib.suppress(OverflowError):
        return float(value) if origin is float else value
  elif origin is not typing.Literal or value in arguments:
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


def parse_json(text: str | bytes) -> Any:
  """Returns what `to_json` took, from the text of it.

  Raises:
    ValueError: it is no JSON, or has a number that `to_json` writes as a string.
  """
  try:
    return from_json(json.loads(text, parse_float=_finite, parse_constant=_finite))
  except RecursionError as error:
    raise ValueError(str(error)) from None


def _finite(text: str) -> float:
  if not math.isfinite(number := float(text)):
    raise ValueError(f"{text} is not finite")
  return number


def read_json(path: str | os.PathLike[str]) -> Any:
  """Reads what `write_json` wrote.

  Returns:
    The values, with non-finite numbers as floats again, and tuples as lists.

  Raises:
    UsageError: the file does not exist, cannot be read or is damaged.
  """
  try:
    return _read_json(path)
  except UsageError:
    raise
  except ValueError:
    raise UsageError(f"The file {path} is damaged: it holds no JSON.") from None


def _read_json(path: str | os.PathLike[str]) -> Any:
  try:
    with reading(path):
      return parse_json(workdir_path(path).read_bytes())
  except ABSENT as error:
    reason = "a directory is there" if isinstance(error, IsADirectoryError) else ""
    raise UsageError(f"There is no file {path}{reason and ': '}{reason}.") from None


@contextlib.contextmanager
def reading_record(path: str | os.PathLike[str]) -> Iterator[Any]:
  """Reads a file of a run, of which `as_type` makes something in the block.

  Yields:
    What `read_json` returns.

  Raises:
    UsageError: as `read_json` does, or the block raised a ValueError.
  """
  try:
    yield _read_json(path)
  except UsageError:
    raise
  except ValueError as error:
    raise UsageError(
      f"The file {path} is damaged or of another version ({error}): use another "
      "--workdir, or move the file away, and the same command makes it again from the "
      "last checkpoint."
    ) from None


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
  """Makes an error of the system in the block a `UsageError`.

  What the system does not read may be intact: nobody may take it for damaged. But
  where there is no such file, the error remains one of `ABSENT`.

  Args:
    path: what the block reads.
  """
  try:
    yield
  except ABSENT:
    raise
  except OSError as error:
    # A library did not understand what it read.
    if error.errno is None:
      raise
    raise UsageError(
      f"{error.filename or path} cannot be read ({error.strerror}): it may be intact, "
      "and the same command goes on once it can be."
    ) from error


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
    UsageError: the file cannot be written.
  """
  with extra("train"):
    import filelock
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
      raise UsageError(f"{path} cannot be locked ({error.strerror}).") from error
    return contextlib.nullcontext()


def is_locked(path: str | os.PathLike[str]) -> bool:
  """Tells whether a `lock` is held; where that cannot be known, that it is."""
  with extra("train"):
    import filelock
  try:
    with filelock.FileLock(path).acquire(timeout=0):
      return False
  except OSError:
    return True


@contextlib.contextmanager
def workdir_errors(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Makes an error of the system in the block a `UsageError` that says how to go on.

  Args:
    workdir: the run's directory, in which the block reads and writes.
  """
  try:
    yield
  except UsageError:
    raise
  except (OSError, ValueError) as error:
    number, file = getattr(error, "errno", None), getattr(error, "filename", None)
    # TensorStore, which writes the arrays of checkpoints, has the system's reason in
    # the text of a ValueError.
    match = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(match[1]) if match and number is None else number
    if number is None:
      raise
    where = f": {file}" if file is not None else ""
    remedy = "make space" if number in _FULL else "mend that"
    raise UsageError(
      f"The workdir {workdir} cannot be used ({os.strerror(number)}{where}): {remedy}, "
      "and the same command goes on from the last checkpoint."
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
      "pip install 'skipinit_jax[gcs]' brings what buckets need, or name a directory "
      "as --workdir."
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
