"""Real processes, with two virtual devices each, that train one run together."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import time
import urllib.request

import jax
import pytest

from skipinit_jax.data.prepare import sample_photos
from skipinit_jax.errors import UsageError
from skipinit_jax.files import lock
from skipinit_jax.training import TrainConfig, distributed, load_trained
from skipinit_jax.training.checkpoints import Checkpoints
from skipinit_jax.training.metrics import read_metrics
from tests.training.runs import StopAt, assert_close, rows_of, train

# 1472 training examples make 11 steps an epoch.
STEPS_PER_EPOCH = 11
CONFIG = TrainConfig(
  model="residual_mlp",
  depth=2,
  width=16,
  batch_size=128,
  epochs=2,
  learning_rate=0.03,
)
# A ghost batch is one device's part of the batch of 4 devices, that of two of 8.
CONFIGS = {
  "batch_norm": dataclasses.replace(CONFIG, method="batch_norm"),
  # A ghost batch is two devices' part of the batch: one process's.
  "ghost_batch_norm": dataclasses.replace(
    CONFIG, method="batch_norm", ghost_batch_size=64
  ),
}
# Read from files; 250 photographs make 3 steps an epoch. Parameters
# are cut among all devices.
STREAMED = dataclasses.replace(
  CONFIG,
  dataset="sample_photos",
  data_workers=0,
  image_size=8,
  batch_size=64,
  method="skipinit",
  shard_params=True,
)
# Processes that wait for each other share the machine with whatever else runs there.
LIMIT_SECONDS = 400


@pytest.fixture
def start(start_program):
  """Starts programs with two devices each, which end with the test."""
  with contextlib.ExitStack() as stack:

    def start(commands, variables=None):
      processes = [
        start_program(command, env={"JAX_NUM_CPU_DEVICES": "2", **each})
        for command, each in zip(
          commands, variables or [{}] * len(commands), strict=True
        )
      ]
      for process in processes:
        stack.enter_context(process)
        stack.callback(process.kill)
      return processes

    yield start


def wait(processes):
  """Waits until all have ended; returns their exit statuses and what they printed."""
  outputs = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in processes]
  return [process.returncode for process in processes], outputs


def wait_for(happened, processes):
  """Waits until something has happened, while all processes run."""
  deadline = time.monotonic() + LIMIT_SECONDS
  while not happened():
    for process in processes:
      if process.poll() is not None or time.monotonic() > deadline:
        process.kill()
        pytest.fail(process.communicate()[0])
    time.sleep(0.05)


@pytest.fixture
def run_tasks(start):
  """Runs tasks of distributed_driver.py in two processes; returns their outcomes."""

  def run(tasks):
    program = ["tests.training.distributed_driver", f"127.0.0.1:{free_port()}", "2"]
    processes = start([[*program, str(i), json.dumps(tasks)] for i in range(2)])
    statuses, outputs = wait(processes)
    assert statuses == [0, 0], "\n---\n".join(outputs)
    return [
      [json.loads(line) for line in re.findall("^outcome (.*)", output, re.M)]
      for output in outputs
    ]

  return run


def free_port():
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]


def task(workdir, config, **on_process):
  """A task for the driver; `p1={"stop_after": 2}` is of process 1 alone."""
  return {
    "workdir": str(workdir),
    "config": dataclasses.asdict(config),
    "on_process": {name[1:]: value for name, value in on_process.items()},
  }


def assert_same_trajectory(workdir, expected, num_test_examples=325):
  """Asserts that two runs differ by rounding only."""
  actual, expected = rows_of(workdir), rows_of(expected)
  assert [(row["step"], row["kind"]) for row in actual] == [
    (row["step"], row["kind"]) for row in expected
  ]
  for row, other in zip(actual, expected, strict=True):
    for name in ("loss", "grad_norm"):
      if name in row:
        assert row[name] == pytest.approx(other[name], rel=1e-3), (row, other)
    # At most two examples more or less.
    tolerance = 2.1 / num_test_examples
    assert row["accuracy"] == pytest.approx(other["accuracy"], abs=tolerance)


def test_two_processes_are_as_one(run_tasks, tmp_path):
  sample_photos.prepare(str(tmp_path / "data"))
  streamed = dataclasses.replace(STREAMED, data_dir=str(tmp_path / "data"))
  configs = CONFIGS | {"streamed": streamed}
  for name, config in configs.items():
    train(config, tmp_path / f"{name}_alone", num_devices=4)
  # The processes find this run begun: they restore what one process has written.
  config = CONFIGS["batch_norm"]
  begun = train(config, tmp_path / "batch_norm", num_devices=4, stop=StopAt(2))
  assert 0 < begun.step < STEPS_PER_EPOCH
  (tmp_path / "used").mkdir()
  with lock(tmp_path / "used" / "lock"):
    outcomes = run_tasks(
      [
        *(task(tmp_path / name, config) for name, config in configs.items()),
        # What one cannot do, none does.
        task(tmp_path / "none", config, p1={"config": {"learning_rate": 0.5}}),
        task(tmp_path / "none", config, p1={"code": {"training/loop.py": "0123"}}),
        task(tmp_path / "none", config, p1={"data_error": "There is no data."}),
        task(tmp_path / "used", config),
        # Finished already.
        task(tmp_path / "ghost_batch_norm", CONFIGS["ghost_batch_norm"]),
      ]
    )
  # Both came to the same.
  assert outcomes[0] == outcomes[1]
  *completed, settings, code, data, used, again = outcomes[0]
  complete = {"status": "completed", "device": "4 x cpu"}
  of_digits = complete | {"step": 2 * STEPS_PER_EPOCH}
  assert [*completed, again] == [of_digits] * 2 + [complete | {"step": 6}, of_digits]
  for name, config in configs.items():
    num_test_examples = 50 if config is streamed else 325
    alone = tmp_path / f"{name}_alone"
    assert_same_trajectory(tmp_path / name, alone, num_test_examples)
    # One process reads what they have written.
    assert_close(
      load_trained(tmp_path / name).variables,
      load_trained(alone).variables,
      rtol=1e-2,
      atol=1e-3,
    )

  who = "Process 1 (here) differs from process 0 (there): "
  assert settings["error"].startswith(f"{who}learning_rate is 0.03 there and 0.5 here;")
  assert code["error"].startswith(f"{who}code.training/loop.py is ")
  assert data["error"] == "There is no data."
  assert "is in use by another run" in used["error"]
  assert not (tmp_path / "none").exists()


def test_lost_and_preempted_processes(start, run_tasks, tmp_path):
  # An epoch has four steps and ends with a checkpoint.
  config = dataclasses.replace(
    CONFIGS["batch_norm"],
    batch_size=368,
    epochs=100_000,
    checkpoint_every_seconds=0,
  )
  workdir, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
  names = ("model", "depth", "width", "method", "batch_size", "epochs")
  names += ("learning_rate", "checkpoint_every_seconds")
  program = ["experiments.train", f"--workdir={workdir}"]
  program += [f"--config.{name}={getattr(config, name)}" for name in names]

  def num_epochs():
    with contextlib.suppress(UsageError):
      return max([row["epoch"] for row in read_metrics(workdir)], default=0)
    return 0

  def has_checkpoints():
    # Written while training goes on, they come later than the metrics.
    return sum(path.name.isdigit() for path in workdir.glob("checkpoints/*")) == 2

  flags = [f"--coordinator_address=127.0.0.1:{free_port()}", "--num_processes=2"]
  processes = start([[*program, *flags, f"--process_id={i}"] for i in range(2)])
  wait_for(has_checkpoints, processes)
  processes[1].kill()
  statuses, outputs = wait(processes)
  # Which of the two comes first, the collective's failure or the runtime's abort, is
  # chance.
  assert statuses[0] in (5, -signal.SIGABRT), outputs[0]
  assert re.search("error: Another process of the run was lost|task died", outputs[0])
  assert not (workdir / "result.json").exists()
  killed_at = num_epochs()

  slurm = {
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "JAX_COORDINATOR_PORT": str(free_port()),
  }
  tasks = [slurm | {"SLURM_PROCID": i, "SLURM_LOCALID": i} for i in ("0", "1")]
  processes = start([program, program], tasks)
  wait_for(lambda: num_epochs() > killed_at, processes)
  # Preemption tells one host.
  processes[1].send_signal(signal.SIGTERM)
  statuses, (first, second) = wait(processes)
  assert statuses == [4, 4], first
  assert "resumed from step" in first
  saved = re.search(r"Interrupted and saved at step (\d+):", first)
  # One process speaks for all.
  assert "Interrupted" not in second
  steps = [int(path) for path in os.listdir(workdir / "checkpoints")]
  assert max(steps) == int(saved[1])

  until = num_epochs() + 1
  run_tasks(
    [
      task(workdir, config, p0={"stop_after": until}),
      task(undisturbed, config, p1={"stop_after": until}),
    ]
  )
  expected = [row for row in rows_of(undisturbed) if row["epoch"] <= until]
  assert len(expected) == 2 * until
  # To the bit, through a crash and a preemption.
  assert [row for row in rows_of(workdir) if row["epoch"] <= until] == expected


def test_processes_with_other_random_numbers(start, tmp_path):
  program = ["experiments.train", f"--workdir={tmp_path / 'run'}", "--num_processes=2"]
  program.append(f"--coordinator_address=127.0.0.1:{free_port()}")
  processes = start(
    [[*program, f"--process_id={index}"] for index in range(2)],
    [{}, {"JAX_DEFAULT_PRNG_IMPL": "rbg"}],
  )
  statuses, outputs = wait(processes)
  assert statuses == [1, 1]
  for output in outputs:
    assert 'jax_default_prng_impl is "threefry2x32" there and "rbg" here' in output
  assert not (tmp_path / "run").exists()


def test_one_process_needs_no_runtime():
  distributed.initialize()
  assert not jax.distributed.is_initialized()
  assert distributed.is_first()
  assert distributed.gather({"a": 1}) == [{"a": 1}]
  assert distributed.from_first("b") == "b"
  with pytest.raises(UsageError, match="no data"), distributed.share_errors():
    raise UsageError("no data")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      {"coordinator_address": "a:1", "num_processes": 2},
      "--process_id missing: give ",
    ),
    (
      {"coordinator_address": "host", "num_processes": 2, "process_id": 0},
      "--coordinator_address is 'host': it must be HOST:PORT, such as ",
    ),
    (
      {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
      "--process_id is 2: with --num_processes=2 it must be from 0 to 1.",
    ),
  ],
)
def test_bad_arguments(arguments, message):
  with pytest.raises(UsageError) as error:
    distributed.initialize(**arguments)
  assert str(error.value).startswith(message)
  assert not jax.distributed.is_initialized()


def test_port_in_use():
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(UsageError, match=f"cannot listen at port {port} of --coord"):
      distributed.initialize(f"localhost:{port}", 2, 0)


def test_nobody_answers(monkeypatch):
  monkeypatch.setattr(distributed, "_START_SECONDS", 0)
  address = f"localhost:{free_port()}"
  with pytest.raises(
    UsageError, match=f"not answer at --coordinator_address={address}"
  ):
    distributed.initialize(address, 2, 1)


STEP = {
  "SLURM_JOB_ID": "7",
  "SLURM_STEP_NODELIST": "n[1-2]",
  "SLURM_PROCID": "1",
  "SLURM_LOCALID": "0",
  "SLURM_STEP_NUM_TASKS": "4",
}


@pytest.fixture
def environment(monkeypatch):
  """Sets variables where none of a cluster are set."""
  for name in list(os.environ):
    if name.startswith(("SLURM_", "TPU_", "MEGASCALE_", "GCE_")):
      monkeypatch.delenv(name)
  return lambda variables: [monkeypatch.setenv(*item) for item in variables.items()]


def test_slurm(environment):
  assert not distributed.in_slurm_step()
  # A batch script or a shell of an allocation of four tasks is one process.
  environment({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
  assert not distributed.in_slurm_step()
  environment(STEP | {"SLURM_STEP_NUM_TASKS": "1"})
  assert not distributed.in_slurm_step()
  environment(STEP)
  assert distributed.in_slurm_step()
  environment({"SLURM_STEP_NUM_NODES": "2"})
  # Two tasks of a node share its GPUs; one has them all.
  assert "local_device_ids" not in distributed._slurm_arguments()
  environment({"SLURM_STEP_NUM_NODES": "4"})
  assert distributed._slurm_arguments() == {
    "cluster_detection_method": "slurm",
    "num_processes": 4,
    "local_device_ids": [],
  }


@pytest.fixture
def any_platform():
  """Leaves the choice of the platform open, as on a machine with an accelerator."""
  jax.devices()
  jax.config.update("jax_platforms", None)
  yield
  jax.config.update("jax_platforms", "cpu")


@pytest.mark.usefixtures("any_platform")
def test_tpu_pod(environment, monkeypatch):
  endpoints = "a:0:10.0.0.1,b:1:10.0.0.2"

  def urlopen(request, timeout):
    assert request.full_url.endswith("/instance/attributes/worker-network-endpoints")
    assert request.get_header("Metadata-flavor") == "Google"
    return io.BytesIO(endpoints.encode())

  # Without chips nobody is asked.
  assert not distributed.in_tpu_pod()
  environment({"TPU_ML_PLATFORM": "JAX", "GCE_METADATA_IP": "127.0.0.1:9"})
  # A server that is not there does not matter.
  assert not distributed.in_tpu_pod()
  monkeypatch.setattr(urllib.request, "urlopen", urlopen)
  assert distributed.in_tpu_pod()
  endpoints = "a:0:10.0.0.1"
  assert not distributed.in_tpu_pod()
  environment({"TPU_WORKER_HOSTNAMES": "host0,host1"})
  assert distributed.in_tpu_pod()
  environment({"TPU_WORKER_HOSTNAMES": "localhost"})
  assert not distributed.in_tpu_pod()
  environment({"MEGASCALE_NUM_SLICES": "2"})
  assert distributed.in_tpu_pod()
  jax.config.update("jax_platforms", "cpu")
  assert not distributed.in_tpu_pod()


def test_workdir_that_others_do_not_see(tmp_path, monkeypatch):
  # What process 0 makes lies elsewhere, as on a disk of its own.
  shared = distributed.share_errors

  @contextlib.contextmanager
  def share_errors():
    with shared():
      yield
    shutil.rmtree(tmp_path / "run", ignore_errors=True)

  monkeypatch.setattr(distributed, "share_errors", share_errors)
  with pytest.raises(UsageError, match=r"does not see the workdir .*/run of process 0"):
    Checkpoints(tmp_path / "run", config={})
