"""A disk that is full: one sentence, nothing lost, and the same command goes on."""

import dataclasses
import errno
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.event_file_writer import EventsWriter

from skipinit_jax.errors import UsageError
from skipinit_jax.files import read_json
from skipinit_jax.training import Checkpoints, TrainConfig, checkpoints, loop
from skipinit_jax.training.checkpoints import read_latest
from tests.training import runs
from tests.training.runs import StopAt, rows_of

ROOT = pathlib.Path(__file__).parents[2]
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


@pytest.fixture
def stopped(finished, tmp_path):
  """The workdir of a run that has a checkpoint and was stopped in its first epoch."""
  assert train(tmp_path, stop=StopAt(2)).status == "interrupted"
  assert checkpoint_steps(tmp_path)
  return tmp_path


def checkpoint_steps(workdir):
  names = os.listdir(workdir / "checkpoints")
  return sorted(int(name) for name in names if name.isdigit())


def assert_goes_on(workdir, finished):
  """Checks that the same call completes the run as if nothing had happened."""
  step, _ = read_latest(workdir, ("step",))
  assert step == checkpoint_steps(workdir)[-1]
  result = train(workdir)
  expected = read_json(finished / "result.json")
  assert (result.status, result.step) == ("completed", 46)
  assert (result.test_loss, result.train_loss) == (
    expected["test_loss"],
    expected["train_loss"],
  )
  assert rows_of(workdir) == rows_of(finished)
  assert not list(workdir.rglob("*tmp*"))


def command(workdir):
  fields = dataclasses.asdict(CONFIG)
  changed = {n: v for n, v in fields.items() if v != getattr(TrainConfig(), n)}
  flags = [f"--config.{name}={value}" for name, value in changed.items()]
  return [sys.executable, "-m", "experiments.train", f"--workdir={workdir}", *flags]


def error_of(done):
  """Returns a failed program's sentence, of which there is one."""
  assert done.returncode == 1, done.stdout + done.stderr
  (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  return line.removeprefix("error: ")


def test_each_file(stopped, finished, monkeypatch):
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
  assert message_of(checkpoints.shutil, "disk_usage", lambda path: usage) == (
    f"The workdir {stopped} has 0.5 MiB of free space, but a checkpoint takes 0.6 MiB: "
    "make space, and the same command goes on from the last checkpoint."
  )
  full = (
    f"The workdir {stopped} cannot be written (No space left on device): make space, "
    "and the same command goes on from the last checkpoint."
  )
  assert message_of(loop.MetricsWriter, "write") == full
  assert message_of(EventsWriter, "flush") == full
  (stopped / "config.json").unlink()
  assert message_of(checkpoints, "write_json") == full
  assert checkpoint_steps(stopped) == before
  assert message_of(loop, "write_json") == full
  assert_goes_on(stopped, finished)


def test_a_step_that_is_saved_needs_no_space(tmp_path, monkeypatch):
  with Checkpoints(tmp_path, config={}) as opened:
    opened.save(1, {"x": np.ones(3)})
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    opened.save(1, {"x": np.ones(3)})
    with pytest.raises(UsageError, match=r"has 0\.0 MiB of free space"):
      opened.save(2, {"x": np.ones(3)})
    # Some file systems do not know their size.
    usage = usage._replace(total=0)
    opened.save(2, {"x": np.ones(3)})
  assert checkpoint_steps(tmp_path) == [1, 2]


# Orbax leaves the writes of other arrays unawaited when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_error_in_the_middle_of_a_checkpoint(stopped, finished):
  # A limit on the size of files is an error at the same places as a full disk, and
  # needs no privilege. Only the arrays of a checkpoint are larger.
  resource = pytest.importorskip("resource")
  before = checkpoint_steps(stopped)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
  try:
    with pytest.raises(UsageError) as caught:
      train(stopped)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert str(caught.value) == (
    f"The workdir {stopped} cannot be written (File too large): make space, and the "
    "same command goes on from the last checkpoint."
  )
  assert checkpoint_steps(stopped) == before
  assert_goes_on(stopped, finished)


def can_mount(folder):
  done = subprocess.run(
    ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True
  )
  return done.returncode == 0


def test_disk_that_is_full(finished, tmp_path, child_environment):
  disk = tmp_path / "disk"
  disk.mkdir()
  if not (shutil.which("unshare") and can_mount(disk)):
    pytest.skip("This machine lets no test mount a small disk.")
  workdir = disk / "run"
  # Space for one checkpoint. Then there is more, and the run is copied out of the
  # mount, which nobody else sees.
  script = f"""
    mount -t tmpfs -o size=1m tmpfs {disk}
    "$@"
    [ $? = 1 ] || exit 2
    find {workdir}/checkpoints -maxdepth 1 -name '[0-9]*' -printf '%f\\n'
    mount -o remount,size=20m {disk}
    "$@" >&2 || exit 3
    cp -r {workdir} {tmp_path}/copy
    exit 1
  """
  done = subprocess.run(
    ["unshare", "-rm", "bash", "-c", script, "bash", *command(workdir)],
    cwd=ROOT,
    env=child_environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  message = error_of(done)
  assert message.startswith(f"The workdir {workdir} has 0.")
  assert message.endswith("the same command goes on from the last checkpoint.")
  assert done.stdout == "23\n"
  assert "resumed from step 23\n" in done.stderr
  assert "Traceback" not in done.stderr
  result = read_json(tmp_path / "copy" / "result.json")
  assert result["test_loss"] == pytest.approx(
    read_json(finished / "result.json")["test_loss"], rel=1e-4
  )
