"""Workdirs: directories of a file system, or folders of Google's buckets.

That of a run holds what the constants here name.
"""

import contextlib
import errno
import functools
import os
import pathlib
import re
from collections.abc import Iterator
from typing import TypeAlias

from etils import epath

from skipinit_jax.errors import UsageError

Path: TypeAlias = pathlib.Path | epath.Path
"""Of a directory of a file system, or of a folder of a bucket."""

CONFIG = "config.json"
RESULT = "result.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
LOCK = "lock"

_FOLDER = re.compile(r"gs://(?P<bucket>[a-z0-9][\w.-]+)/[^?#*\[\]]*[^?#*\[\]/]/?")
_SECONDS = 10.0
# Of a disk that is full; the last one is that of a limit on the size of a file, as by
# `ulimit -f`.
_FULL = tuple(map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)))


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
    content: the whole of it.
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
    # Of a disk that is full, it would keep some space.
    unfinished.unlink(missing_ok=True)
    raise


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
