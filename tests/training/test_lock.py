"""Locks that keep two runs out of one directory, and end with their process."""

import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.training import TrainConfig, train
from skipinit_jax.training.lock import Lock, LockedError, is_locked
from skipinit_jax.training.workdir import LOCK

HOLDER = textwrap.dedent("""
  import sys, time
  from skipinit_jax.training.lock import Lock, is_locked
  assert not is_locked(sys.argv[1])
  lock = Lock(sys.argv[1])
  print("held", flush=True)
  time.sleep(600)
""")


@pytest.fixture
def start_holder():
  """Starts a process that holds the lock on a file, and returns it once it does."""
  processes = []

  def start(path):
    process = subprocess.Popen(
      [sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True
    )
    processes.append(process)
    assert process.stdout.readline() == "held\n"
    return process

  yield start
  for process in processes:
    process.kill()
    process.communicate()


def test_a_lock_is_held_until_its_end(tmp_path):
  path = tmp_path / "lock"
  assert not is_locked(path)
  assert not path.exists(), "asking makes no file"
  with Lock(path):
    assert is_locked(path)
  assert not is_locked(path)
  lock = Lock(path)
  assert is_locked(path)
  lock.close()
  lock.close()
  assert not is_locked(path)
  assert path.exists()


@pytest.mark.parametrize("path", ["", "absent/lock", "."])
def test_what_is_no_file_is_not_locked(path, tmp_path):
  assert not is_locked(path and tmp_path / path)


def test_a_second_lock_is_one_sentence(tmp_path):
  with Lock(tmp_path / "lock"):
    with pytest.raises(LockedError) as error:
      Lock(tmp_path / "lock")
    with Lock(tmp_path / "another"):
      pass
  assert str(error.value) == (
    f"The workdir {tmp_path} is in use by another run: wait until that ends, or use "
    "another --workdir."
  )
  assert isinstance(error.value, UsageError)
  Lock(tmp_path / "lock").close()


def test_of_many_threads_one_gets_the_lock(tmp_path):
  start, count = threading.Barrier(8), 8
  locks, errors = [], []

  def take():
    start.wait()
    try:
      locks.append(Lock(tmp_path / "lock"))
    except LockedError as error:
      errors.append(error)

  threads = [threading.Thread(target=take) for _ in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (len(locks), len(errors)) == (1, count - 1)
  locks[0].close()


def test_asking_keeps_nobody_who_asks_from_the_truth(tmp_path):
  path = tmp_path / "lock"
  path.touch()
  answers = []

  def ask():
    answers.extend(is_locked(path) for _ in range(2000))

  threads = [threading.Thread(target=ask) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(answers) == 8000 and not any(answers)


def test_another_process_holds_the_lock_until_it_is_killed(start_holder, tmp_path):
  path = tmp_path / "lock"
  holder = start_holder(path)
  assert is_locked(path)
  with pytest.raises(LockedError):
    Lock(path)
  os.kill(holder.pid, signal.SIGKILL)
  holder.wait()
  assert not is_locked(path)
  with Lock(path):
    assert is_locked(path)


def test_a_child_does_not_keep_its_parent_s_lock(tmp_path):
  code = "import time; print('started', flush=True); time.sleep(600)"
  with Lock(tmp_path / "lock"):
    child = subprocess.Popen(
      [sys.executable, "-c", code], stdout=subprocess.PIPE, close_fds=False
    )
    assert child.stdout.readline() == b"started\n"
  try:
    assert not is_locked(tmp_path / "lock")
  finally:
    child.kill()
    child.communicate()


def test_two_runs_do_not_train_in_one_workdir(tmp_path):
  config = TrainConfig(model="residual_mlp", depth=2, width=8, epochs=1, batch_size=736)
  with (
    Lock(tmp_path / LOCK),
    pytest.raises(UsageError, match=f"^The workdir {tmp_path} is in use by another"),
  ):
    train(config, tmp_path, show_progress=False)
  # Nothing was written that the next run would stumble over.
  assert [path.name for path in tmp_path.iterdir()] == [LOCK]
  assert train(config, tmp_path, show_progress=False).status == "completed"
  assert not is_locked(tmp_path / LOCK)


def test_the_program_says_that_its_workdir_is_in_use(run_program, tmp_path):
  with Lock(tmp_path / LOCK):
    result = run_program(
      [
        "experiments.train",
        f"--workdir={tmp_path}",
        "--config.model=residual_mlp",
        "--config.epochs=1",
      ],
      status=1,
    )
  assert result.stderr.strip() == (
    f"error: The workdir {tmp_path} is in use by another run: wait until that ends, or "
    "use another --workdir."
  )
