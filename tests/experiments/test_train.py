"""The program as its users run it, killed and given bad input."""

import json
import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from skipinit_jax.files import read_json
from skipinit_jax.training import Checkpoints, TrainConfig
from skipinit_jax.training.metrics import read_metrics
from tests.training.runs import make_step, rows_of

# Normalization, dropout and augmentation: everything that a state can hold.
COMMON = {"method": "batch_norm", "dropout_rate": 0.1, "crop_padding": 1, "flip": True}
# Many short epochs, each with a checkpoint.
MLP = COMMON | {
  "model": "residual_mlp",
  "depth": 4,
  "width": 16,
  "epochs": 12,
  "checkpoint_every_seconds": 0.0,
}
# Epochs of many slow steps.
WRN = COMMON | {"depth": 10, "batch_size": 16, "epochs": 2}
WRN_STEPS_PER_EPOCH = 92


def command(workdir, **fields):
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  return ["experiments.train", f"--workdir={workdir}", *flags]


def saved_state(workdir, fields):
  """Returns the step and the bits of the newest checkpoint's state."""
  config = TrainConfig(**fields)
  _, template, _ = make_step(config)
  with Checkpoints(workdir, config=read_json(workdir / "config.json")) as checkpoints:
    step, state = checkpoints.restore_latest(template)
  return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def assert_same_run(actual, expected, fields):
  assert saved_state(actual, fields) == saved_state(expected, fields)
  assert rows_of(actual) == rows_of(expected)
  results = [read_json(workdir / "result.json") for workdir in (actual, expected)]
  for name in ("status", "step", "train_loss", "test_loss", "test_accuracy"):
    assert results[0][name] == results[1][name]
  assert results[0]["status"] == "completed"


def committed_steps(workdir):
  """Returns the steps of the checkpoints that are complete."""
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def last_step(workdir):
  """Returns the step of the last row, 0 where there is none."""
  if not (workdir / "metrics.jsonl").exists():
    return 0
  return max((row["step"] for row in read_metrics(workdir)), default=0)


def wait_until(process, condition):
  """Waits until a condition holds while a program runs."""
  deadline = time.monotonic() + 200
  while not condition():
    if process.poll() is not None:
      pytest.fail(f"ended early with {process.returncode}: {process.stdout.read()}")
    assert time.monotonic() < deadline
    time.sleep(0.005)


def end(process, number):
  """Sends a signal and returns what the program printed and its exit status."""
  process.send_signal(number)
  output, _ = process.communicate(timeout=200)
  return output, process.returncode


def test_killed_again_and_again(run_program, start_program, tmp_path):
  expected, workdir = tmp_path / "expected", tmp_path / "run"
  run_program(command(expected, **MLP), status=0)
  rng = random.Random()
  for _ in range(2):
    before = last_step(workdir)
    process = start_program(command(workdir, **MLP))
    target = before + 23 * rng.randint(1, 4)
    wait_until(process, lambda target=target: last_step(workdir) >= target)
    # Most of this program's time is in evaluation and in writing checkpoints.
    time.sleep(rng.random() * 0.3)
    _, status = end(process, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert not (workdir / "result.json").exists()
  resumed_from = committed_steps(workdir)[-1]
  done = run_program(command(workdir, **MLP), status=0)
  assert f"resumed from step {resumed_from}\n" in done.stderr
  assert_same_run(workdir, expected, MLP)


@pytest.fixture(scope="module")
def undisturbed(run_program, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed")
  done = run_program(command(workdir, **WRN), status=0)
  return workdir, done


def test_says_what_it_came_to(undisturbed):
  workdir, done = undisturbed
  result = read_json(workdir / "result.json")
  sentence, files = done.stdout.splitlines()
  assert f"Test accuracy {100 * result['test_accuracy']:.2f} %, test loss" in sentence
  assert f"{workdir}/result.json" in files and f"{workdir}/metrics.jsonl" in files
  # Progress in plain lines, since nothing here is a terminal.
  assert done.stderr.startswith("step 1/184, epoch 1/2, loss ")
  assert "\033" not in done.stderr


def test_killed_amid_an_epoch(undisturbed, run_program, start_program, tmp_path):
  fields = WRN | {"checkpoint_every_seconds": 0.01}
  process = start_program(command(tmp_path, **fields))
  wait_until(
    process,
    lambda: any(
      step > 2 and step % WRN_STEPS_PER_EPOCH for step in committed_steps(tmp_path)
    ),
  )
  _, status = end(process, signal.SIGKILL)
  assert status == -signal.SIGKILL
  resumed_from = committed_steps(tmp_path)[-1]
  done = run_program(command(tmp_path, **fields), status=0)
  assert f"resumed from step {resumed_from}\n" in done.stderr
  assert_same_run(tmp_path, undisturbed[0], fields)


def test_asked_to_stop(undisturbed, run_program, start_program, tmp_path):
  process = start_program(command(tmp_path, **WRN))
  while not (line := process.stdout.readline()).startswith("step 1/184"):
    assert line, "ended early"
  output, status = end(process, signal.SIGTERM)
  assert status == 4
  # Nothing else saves in the first minute.
  (step,) = committed_steps(tmp_path)
  assert 0 < step < WRN_STEPS_PER_EPOCH
  assert f"Interrupted and saved at step {step}: the same command resumes it." in output
  result = json.loads((tmp_path / "result.json").read_bytes())
  assert (result["status"], result["step"]) == ("interrupted", step)
  done = run_program(command(tmp_path, **WRN), status=0)
  assert f"resumed from step {step}\n" in done.stderr
  assert_same_run(tmp_path, undisturbed[0], WRN)


def test_diverged(run_program, tmp_path):
  fields = MLP | {"method": "unnormalized", "learning_rate": 1e30}
  done = run_program(command(tmp_path, **fields), status=3)
  step = read_json(tmp_path / "result.json")["step"]
  assert done.stdout.startswith(
    f"Diverged: the loss or a parameter is not finite after step {step}.\n"
  )
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"method": "batchnorm"}, "Unknown method 'batchnorm' (did you mean 'batch_norm'?"),
    ({"depth": 17}, "depth is 17: a Wide-ResNet has 6 n + 4 layers, such as 16 or 22."),
    ({"batch_size": 2048}, "Batch size 2048 is not between 1 and 1472, the number of"),
  ],
)
def test_bad_configuration(fields, message, run_program, tmp_path):
  workdir = tmp_path / "run"
  done = run_program(command(workdir, **fields), status=1)
  assert done.stdout == ""
  assert done.stderr.startswith(f"error: {message}")
  assert done.stderr.count("\n") == 1
  assert not workdir.exists()


def test_workdir_that_cannot_be_written(run_program):
  done = run_program(command("/dev/null/run", **MLP), status=1)
  assert done.stdout == ""
  assert done.stderr.startswith("error: The workdir /dev/null/run ")
  assert done.stderr.count("\n") == 1


def test_damaged_data_cache(run_program, tmp_path):
  cache = tmp_path / "skipinit_jax" / "data" / "digits.npz"
  cache.parent.mkdir(parents=True)
  cache.write_bytes(b"not an archive")
  workdir = tmp_path / "run"
  done = run_program(
    command(workdir, **MLP), env={"XDG_CACHE_HOME": str(tmp_path)}, status=1
  )
  assert done.stdout == ""
  assert done.stderr.startswith(f"error: The data cache {cache} is damaged: delete it")
  assert done.stderr.count("\n") == 1
  assert not workdir.exists()
