"""The program as its users run it: killed, stopped, resumed and diverged."""

import gzip
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
from tests.training.runs import make_step, rows_of

# Normalization, dropout and augmentation are everything that a state can hold. An epoch
# takes longer than half a second, for which a run computes before it may save.
FIELDS = {
  "method": "batch_norm",
  "dropout_rate": 0.1,
  "crop_padding": 1,
  "flip": True,
  "depth": 40,
  "batch_size": 16,
  "epochs": 4,
}
STEPS_PER_EPOCH = 92
NUM_STEPS = FIELDS["epochs"] * STEPS_PER_EPOCH


def command(workdir, **fields):
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  return ["experiments.train", f"--workdir={workdir}", *flags]


def saved_state(workdir):
  """Returns the step and the bits of the newest checkpoint's state."""
  _, template, _ = make_step(TrainConfig(**FIELDS), shapes=True)
  with Checkpoints(workdir, config=read_json(workdir / "config.json")) as checkpoints:
    step, state = checkpoints.restore_latest(template)
  return step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def committed_steps(workdir):
  """Returns the steps of the checkpoints that are complete."""
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.exists() else []
  return sorted(int(name) for name in names if name.isdigit())


def test_profile_has_the_steps_and_no_more(trained_run):
  (trace,) = (trained_run / "profile" / "plugins" / "profile").glob("*/*.trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  names = [event.get("name", "") for event in events]
  # Two of four dispatches of a step; and what XLA computed in them.
  steps = [name for name in names if name.startswith("$trainer.py")]
  assert sum(name.endswith(" train_steps") for name in steps) == 2
  assert "ThunkExecutor::Execute" in names


def kill_amid_an_epoch(process, workdir, before):
  """Kills a run some time after it saved a later step than `before`."""
  deadline = time.monotonic() + 200
  while not any(
    step > before and step % STEPS_PER_EPOCH for step in committed_steps(workdir)
  ):
    if process.poll() is not None:
      pytest.fail(f"ended early with {process.returncode}: {process.stdout.read()}")
    assert time.monotonic() < deadline
    time.sleep(0.005)
  time.sleep(random.random() * 0.1)
  process.kill()
  process.communicate(timeout=200)
  assert process.returncode == -signal.SIGKILL
  assert not (workdir / "result.json").exists()


@pytest.fixture(scope="module")
def undisturbed(run_program, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("undisturbed")
  done = run_program(command(workdir, **FIELDS), status=0)
  return workdir, done


def test_says_what_it_came_to(undisturbed):
  workdir, done = undisturbed
  result = read_json(workdir / "result.json")
  sentence, files = done.stdout.splitlines()
  assert f"Test accuracy {100 * result['test_accuracy']:.2f} %" in sentence
  assert f"{workdir}/result.json" in files and f"{workdir}/metrics.jsonl" in files
  # Progress in plain lines, since nothing here is a terminal.
  what, first, *_ = done.stderr.splitlines()
  size = f"{result['num_parameters']:,} parameters"
  assert all(word in what for word in ("40-1", "batch_norm", size, "1 x cpu", "digits"))
  assert first.startswith(f"step 1/{NUM_STEPS}, epoch 1/4, loss ")
  assert "\033" not in done.stderr


def test_killed_twice_and_asked_to_stop(
  undisturbed, run_program, start_program, tmp_path
):
  often = FIELDS | {"checkpoint_every_seconds": 0.01}
  kill_amid_an_epoch(start_program(command(tmp_path, **often)), tmp_path, 2)
  saved = committed_steps(tmp_path)[-1]
  kill_amid_an_epoch(start_program(command(tmp_path, **often)), tmp_path, saved)
  saved = committed_steps(tmp_path)[-1]

  # Only the end of an epoch and the request save in the first minute.
  process = start_program(command(tmp_path, **FIELDS))
  # Orbax may have a word to say about what a killed save has left.
  assert any(line.endswith(": compiling\n") for line in process.stdout)
  assert process.stdout.readline() == f"resumed from step {saved}\n"
  assert process.stdout.readline().startswith("step ")
  process.terminate()
  output, _ = process.communicate(timeout=200)
  assert process.returncode == 4
  stopped = committed_steps(tmp_path)[-1]
  assert saved < stopped < NUM_STEPS
  assert f"Interrupted and saved at step {stopped}: the same command" in output
  result = read_json(tmp_path / "result.json")
  assert (result["status"], result["step"]) == ("interrupted", stopped)

  done = run_program(command(tmp_path, **FIELDS), status=0)
  assert f"resumed from step {stopped}\n" in done.stderr
  expected, _ = undisturbed
  assert saved_state(tmp_path) == saved_state(expected)
  assert rows_of(tmp_path) == rows_of(expected)
  results = [read_json(workdir / "result.json") for workdir in (tmp_path, expected)]
  for name in ("status", "step", "train_loss", "test_loss", "test_accuracy"):
    assert results[0][name] == results[1][name]
  assert results[0]["status"] == "completed"


def test_diverged(run_program, tmp_path):
  fields = {"model": "residual_mlp", "depth": 4, "width": 16, "learning_rate": 1e30}
  done = run_program(command(tmp_path, method="unnormalized", **fields), status=3)
  step = read_json(tmp_path / "result.json")["step"]
  assert done.stdout.startswith("Diverged: ")
  assert f"after step {step}.\n" in done.stdout
  assert "Traceback" not in done.stderr
