"""Checkpoints of a run: saved in the background, verified before they are used."""

import contextlib
import functools
import glob
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from logging import LogRecord
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
from absl import logging
from etils import epath

from skipinit_jax.errors import UsageError
from skipinit_jax.files import (
  ABSENT,
  CHECKPOINTS,
  CONFIG,
  LOCK,
  RECORD,
  RESULT,
  Path,
  as_type,
  in_bucket,
  lock,
  make_directory,
  parse_json,
  reading,
  reading_record,
  remove_unfinished,
  workdir_path,
  write_json,
)
from skipinit_jax.training import distributed
from skipinit_jax.training.config import differences

if TYPE_CHECKING:
  import orbax.checkpoint as ocp

_DIGESTS = "sha256.json"
# Orbax numbers its saves with one counter of the process. If two threads started a save
# at the same time, one would wait for signals that the other gets, until a time-out.
_SAVING = threading.Lock()


class Checkpoints:
  """The last few checkpoints of one run, and the configuration that it was made with.

  A workdir holds `config.json`, which a later start must agree with, `lock`, which
  keeps other runs out, and `checkpoints`, managed by Orbax. Every process of a run
  makes the same calls; a workdir of several processes is on a file system that all of
  them share, or in a bucket. In a bucket nothing keeps other runs out.

  Example::

    with Checkpoints("/tmp/run", config={"learning_rate": 0.1}) as checkpoints:
      restored = checkpoints.restore_latest(state)
      step, state = restored or (0, state)
      ...
      checkpoints.save(step, state)
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    config: Mapping[str, Any],
    record: Mapping[str, Any] | None = None,
    meaning: Callable[[Mapping[str, Any], bool], Mapping[str, Any]] | None = None,
    keep: int = 2,
  ) -> None:
    """Opens a workdir, or makes it.

    Args:
      directory: the workdir; gs://BUCKET/FOLDER is one in a bucket.
      config: what decides the run's result, as nested dicts of plain values.
      record: what decides it beside the configuration, likewise; None: not compared.
      meaning: returns what a workdir's config means today; it is also told whether that
        has a record. An older version may have written less.
      keep: how many checkpoints to keep. With one alone there is no other to fall back
        to if it is damaged.

    Raises:
      UsageError: the workdir cannot be written, is in use, or was made with another
        config.
    """
    with distributed.share_errors():
      self._workdir = workdir_path(directory)
    self._directory = self._workdir / CHECKPOINTS
    self._keep = keep
    with contextlib.ExitStack() as stack:
      with distributed.share_errors():
        if distributed.is_first():
          make_directory(self._workdir)
          _check_name(self._workdir)
          if not in_bucket(self._workdir):
            stack.enter_context(lock(self._workdir / LOCK))
            # Nobody else writes here now.
            for name in (RECORD, CONFIG, RESULT):
              remove_unfinished(self._workdir / name)
          _check_config(self._workdir, config, record, meaning)
          make_directory(self._directory)
      with distributed.share_errors():
        _check_shared(self._workdir)
      self._manager = _open_manager(self._directory, keep)
      self._lock = stack.pop_all()

  def save(self, step: int, state: Any) -> None:
    """Starts to save a state; the caller may donate or change it at once.

    It waits for the save before it, if that is still being written. Steps only grow:
    a step that is not above the latest one is not saved again.

    Args:
      step: the number of training steps taken.
      state: a pytree of JAX arrays.

    Raises:
      UsageError: the disk has too little space. The checkpoints before are intact.
    """
    import orbax.checkpoint as ocp

    # Space that an earlier save will still take is not free.
    self._manager.wait_until_finished()
    latest = self.latest_step()
    if latest is None or step > latest:
      self._check_space(state)
    with _SAVING:
      self._manager.save(
        step, args=ocp.args.Composite(state=ocp.args.StandardSave(state))
      )

  def _check_space(self, state: Any) -> None:
    """Checks for space, because Orbax's own error comes late and has many lines."""
    with distributed.share_errors():
      if not distributed.is_first() or in_bucket(self._workdir):
        return
      needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
      total, _, free = shutil.disk_usage(self._directory)
      # File systems that do not know how large they are say zero.
      if free < needed and total > 0:
        raise UsageError(
          f"The workdir {self._workdir} has {free:,} bytes of free space, but a "
          f"checkpoint takes {needed:,}: make space, and the same command goes on from "
          "the last checkpoint."
        )

  def restore_latest(self, template: Any) -> tuple[int, Any] | None:
    """Restores the newest checkpoint whose files are what was written.

    A damaged one is reported and removed, so that training can save its step again. One
    that cannot be read may be intact: nothing is removed then.

    Args:
      template: a state, or one of `jax.ShapeDtypeStruct`: the tree, shapes, dtypes and
        shardings to restore into.

    Returns:
      The step and the state; None where nothing was saved yet.

    Raises:
      UsageError: there are checkpoints, and all of them are damaged, one cannot be
        read, or the intact one has another tree than the template.
    """
    import orbax.checkpoint as ocp

    # One process decides for all, because each of them must then restore the same.
    with distributed.share_errors():
      found = self._find_intact() if distributed.is_first() else None
    steps, newest = distributed.from_first(found)
    if not steps:
      return None
    if newest is None:
      raise UsageError(
        f"Every checkpoint in {self._directory} is damaged: remove that directory to "
        "train from the beginning, or use another --workdir."
      )
    for step in steps[: steps.index(newest)]:
      logging.warning(
        "The checkpoint of step %d in %s is damaged: it is removed, and training "
        "goes on from step %d.",
        step,
        self._directory,
        newest,
      )
      self._manager.delete(step)
    # A killed process may not have come to remove what it no longer keeps.
    for step in steps[steps.index(newest) + self._keep :]:
      self._manager.delete(step)
    try:
      state = self._manager.restore(
        newest, args=ocp.args.Composite(state=ocp.args.StandardRestore(template))
      ).state
    except (ValueError, TypeError, KeyError) as error:
      raise UsageError(
        f"The checkpoint of step {newest} in {self._directory} is intact, but not one "
        f"of this version's ({str(error).splitlines()[0]}): use the version that made "
        "it, or another --workdir."
      ) from error
    return newest, state

  def _find_intact(self) -> tuple[list[int], int | None]:
    """Returns all steps, newest first, and the newest that is intact."""
    steps = sorted(self._manager.all_steps(), reverse=True)
    intact = (s for s in steps if _is_intact(self._directory / str(s) / "state"))
    return steps, next(intact, None)

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, one being saved included."""
    return self._manager.latest_step()

  def wait(self) -> None:
    """Waits until the last save is on the disk, and raises its error if it failed."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save, and lets other runs use the workdir."""
    with self._lock:
      self._manager.close()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
    if error_type is not None and jax.process_count() > 1:
      # A save that other processes do not take part in would wait for them.
      self._lock.close()
    else:
      self.close()


def has_checkpoint(workdir: Path) -> bool:
  """Tells whether a run has saved a checkpoint, intact or not."""
  return bool(_finished(workdir / CHECKPOINTS))


def read_latest(
  workdir: str | os.PathLike[str], parts: Collection[str]
) -> tuple[int, dict[str, Any]]:
  """Reads parts of the newest intact checkpoint of a run, on any devices.

  Unlike `Checkpoints` it needs no template and changes nothing in the workdir, so
  that the run may be going on.

  Args:
    parts: names of the state's fields to read.

  Returns:
    The step, and the parts by name, as nested dicts of NumPy arrays.

  Raises:
    UsageError: there is no checkpoint, one cannot be read, or all of them are damaged.
  """
  import orbax.checkpoint as ocp

  directory = workdir_path(workdir) / CHECKPOINTS
  steps = _finished(directory)
  if not steps:
    raise UsageError(
      f"There is no checkpoint in {directory}: that is not a run's workdir, or the run "
      "has not saved one yet."
    )
  for step in steps:
    state = directory / str(step) / "state"
    if _is_intact(state):
      break
    logging.warning("The checkpoint of step %d in %s is damaged.", step, directory)
  else:
    raise UsageError(f"Every checkpoint in {directory} is damaged.")
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
    metadata = handler.metadata(state).tree
    template = {name: metadata[name] for name in parts}
    restore_args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template
    )
    restored = handler.restore(
      state,
      args=ocp.args.PyTreeRestore(
        item=template, restore_args=restore_args, partial_restore=True
      ),
    )
  return step, restored


def _finished(directory: Path) -> list[int]:
  """Returns the steps of all checkpoints that are written, newest first."""
  import orbax.checkpoint as ocp

  with reading(directory):
    paths = [*directory.iterdir()] if directory.is_dir() else []
  # While a checkpoint is being written, its name is more than a number; in a bucket
  # it lacks a file.
  numbered = (epath.Path(path) for path in paths if path.name.isdigit())
  finished = filter(ocp.utils.is_checkpoint_finalized, numbered)
  return sorted((int(path.name) for path in finished), reverse=True)


def _check_name(workdir: Path) -> None:
  """Checks that the arrays of a checkpoint are found where they are written."""
  name = os.fspath(workdir)
  if in_bucket(workdir):
    return
  # TensorStore takes a backslash for a slash: it would write to another directory.
  if os.sep == "/" and "\\" in name:
    raise UsageError(f"The workdir {name} has a backslash: use another --workdir.")
  # Orbax takes the path for a pattern where it joins the parts of a checkpoint.
  if glob.glob(name) != [name]:
    raise UsageError(
      f"The workdir {name}, read as a pattern, is not its own name alone: no "
      "checkpoint could be restored from there. Use one without *, ? and [."
    )


def _check_shared(workdir: Path) -> None:
  """Checks that this process sees what process 0 has made."""
  writable = in_bucket(workdir) or os.access(workdir / CHECKPOINTS, os.W_OK)
  if not (writable and (workdir / CONFIG).exists()):
    raise UsageError(
      f"Process {jax.process_index()} does not see the workdir {workdir} of process 0 "
      "or cannot write there: name a directory of a file system that all processes "
      "share."
    )


def _check_config(
  workdir: Path,
  config: Mapping[str, Any],
  record: Mapping[str, Any] | None,
  meaning: Callable[[Mapping[str, Any], bool], Mapping[str, Any]] | None,
) -> None:
  path, record_path = workdir / CONFIG, workdir / RECORD
  if not path.exists():
    # The record comes first: a configuration without one is an older version's.
    if record is not None:
      write_json(record_path, record)
    write_json(path, config)
    return
  has_record = record_path.exists()
  try:
    with reading(path):
      there = dict(parse_json(path.read_bytes()))
  except UsageError:
    raise
  except (*ABSENT, ValueError, TypeError):
    raise UsageError(
      f"The file {path} is damaged: remove it if this is the configuration that the "
      "workdir was made with, or use another --workdir."
    ) from None
  if found := differences(meaning(there, has_record) if meaning else there, config):
    raise UsageError(
      f"The workdir {workdir} was made with another configuration: "
      f"{', '.join(found)}; use the same configuration or another --workdir."
    )
  if record is None:
    return
  if not has_record:
    write_json(record_path, record)
    return
  with reading_record(record_path) as fields:
    known = as_type(dict[str, Any], fields)
  if found := differences(known, record, known_only=True):
    raise UsageError(
      f"The workdir {workdir} was made with other data or settings: "
      f"{', '.join(found)}; use the same or another --workdir."
    )


def _open_manager(directory: Path, keep: int) -> "ocp.CheckpointManager":
  # Imported here, because it takes a second that reading a flag's help need not wait.
  import orbax.checkpoint as ocp

  class DigestHandler(ocp.StandardCheckpointHandler):
    """Adds the digests of the files to a checkpoint just before it is committed.

    The array files of Orbax (OCDBT over zarr and zstd) carry no checksum: a flipped
    bit in one of them would restore as a wrong number without an error.
    """

    def finalize(self, directory: os.PathLike[str]) -> None:
      super().finalize(directory)
      path = epath.Path(directory)
      write_json(path / _DIGESTS, _digests(path))

  logging.get_absl_logger().addFilter(_is_not_repeated)
  handler = DigestHandler()
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add("state", ocp.args.StandardSave, handler)
  registry.add("state", ocp.args.StandardRestore, handler)
  open_manager = functools.partial(
    ocp.CheckpointManager,
    directory,
    options=ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.LatestN(keep),
      cleanup_tmp_directories=True,
    ),
    handler_registry=registry,
  )
  try:
    return open_manager()
  except UsageError:
    raise
  except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
    # Beside each state is a file of when it was saved, which nobody needs, but which
    # Orbax reads.
    for path in directory.glob("*/_CHECKPOINT_METADATA"):
      path.unlink()
    return open_manager()


def _is_not_repeated(record: LogRecord) -> bool:
  """Keeps Orbax from printing the stack of an error in each thread that meets it.

  The error is raised too, after hundreds of such lines.
  """
  return not (record.exc_info and "orbax" in record.pathname)


def _digests(directory: Path) -> dict[str, str]:
  """Returns the SHA-256 digest of every file by its path in the directory."""
  digests: dict[str, str] = {}
  # `epath.Path` has no rglob, and its walk loses the gs:// of a bucket.
  for path in sorted(directory.iterdir()):
    if path.is_dir():
      inside = _digests(path)
      digests |= {f"{path.name}/{name}": inside[name] for name in inside}
    else:
      with path.open("rb") as file:
        digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
  return digests


def _is_intact(directory: Path) -> bool:
  """Tells whether a checkpoint's files are what was written.

  Raises:
    UsageError: a file cannot be read, which is no damage.
  """
  try:
    with reading(directory):
      written = parse_json((directory / _DIGESTS).read_bytes())
      return written.items() <= _digests(directory).items()
  except UsageError:
    raise
  except (*ABSENT, ValueError, AttributeError, TypeError):
    return False
