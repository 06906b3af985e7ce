"""A disk that is full: one sentence, nothing lost, and the same command goes on."""

import errno
import os
import shutil

import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter

from skipinit_jax.errors import UsageError
from skipinit_jax.files import read_json
from skipinit_jax.training import Checkpoints, TrainConfig, checkpoints, loop
from skipinit_jax.training.checkpoints import read_latest
from tests.training import runs
from tests.training.runs import StopAt, rows_of

# 1472 training examples make 23 steps an epoch; a checkpoint takes 0.6 MiB.
CONFIG = TrainConfig(
  model="residual_mlp",
  depth=4,
  width=128,
  method="batch_norm",
  epochs=2,
  checkpoint_every_seconds=0,
)
NO_SPACE = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def train(workdir, stop=None):
  return runs.train(CONFIG, workdir, num_devices=1, stop=stop)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """The workdir of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("finished")
  train(workdir)
  return workdir


def checkpoint_steps(workdir):
  names = os.listdir(workdir / "checkpoints")
  return sorted(int(name) for name in names if name.isdigit())


# Orbax leaves the writes of other arrays unawaited when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_each_file(finished, tmp_path, monkeypatch):
  resource = pytest.importorskip("resource")
  stopped = tmp_path
  assert train(stopped, stop=StopAt(2)).status == "interrupted"
  before = checkpoint_steps(stopped)

  def fail(*args, **kwargs):
    raise NO_SPACE

  def message_of(owner, name, replacement=fail):
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, replacement)
      with pytest.raises(UsageError) as caught:
        train(stopped)
    return str(caught.value)

  usage = shutil.disk_usage(stopped)._replace(free=2**19)
  message = message_of(checkpoints.shutil, "disk_usage", lambda path: usage)
  assert f"{stopped} has {2**19:,} bytes of free space, but a checkpoint" in message
  full = (
    f"The workdir {stopped} cannot be used (No space left on device): make space, and "
    "the same command goes on from the last checkpoint."
  )
  assert message_of(loop.MetricsWriter, "write") == full
  assert message_of(EventsWriter, "flush") == full
  (stopped / "config.json").unlink()
  assert message_of(checkpoints, "write_json") == full
  assert checkpoint_steps(stopped) == before
  # A limit on the size of files is an error at the same places as a full disk, and
  # needs no privilege. Only the arrays of a checkpoint are larger.
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
  try:
    with pytest.raises(UsageError, match=r"cannot be used \(File too large"):
      train(stopped)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert checkpoint_steps(stopped) == before
  assert message_of(loop, "write_json") == full
  # The same call completes the run as if nothing had happened.
  step, _ = read_latest(stopped, ("step",))
  assert step == checkpoint_steps(stopped)[-1]
  result, expected = train(stopped), read_json(finished / "result.json")
  assert (result.status, result.step) == ("completed", 46)
  for name in ("test_loss", "train_loss"):
    assert getattr(result, name) == expected[name]
  assert rows_of(stopped) == rows_of(finished)
  assert not list(stopped.rglob("*tmp*"))


def test_a_step_that_is_saved_needs_no_space(tmp_path, monkeypatch):
  with Checkpoints(tmp_path, config={}) as opened:
    opened.save(1, {"x": np.ones(3)})
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    opened.save(1, {"x": np.ones(3)})
    with pytest.raises(UsageError, match=r"has 0 bytes of free space"):
      opened.save(2, {"x": np.ones(3)})
    # Some file systems do not know their size.
    usage = usage._replace(total=0)
    opened.save(2, {"x": np.ones(3)})
  assert checkpoint_steps(tmp_path) == [1, 2]
