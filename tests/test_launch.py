"""The files of launch/: their scripts do their work.

No cloud and no Slurm: programs that stand in for theirs record how they were called.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from experiments import program

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
TASKS = sorted(path.name for path in LAUNCH.glob("*.yaml"))
SBATCH = LAUNCH / "slurm.sbatch"
ENVIRONMENT = {
  "WORKDIR": "gs://bucket/run",
  "DATA": "gs://bucket/data",
  "SKYPILOT_NUM_NODES": "1",
  "SKYPILOT_NODE_RANK": "0",
  "SKYPILOT_NODE_IPS": "10.0.0.1",
}


def read_task(name):
  return yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing():
  texts = [path.read_text("utf-8") for path in (SBATCH, ROOT / ".ci/run")]
  texts += [read_task(name)[part] for name in TASKS for part in ("setup", "run")]
  for text in texts:
    command = ["shellcheck", "--shell=bash", "-"]
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def stand_in(path, *, status=0):
  """Writes a program that appends its arguments, a line each call, to a file beside."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    f'#!/usr/bin/env bash\nprintf "%s\\t" "$@" >> "$0.calls"\n'
    f'echo >> "$0.calls"\nexit {status}\n'
  )
  path.chmod(0o700)


def calls(path):
  """Returns the arguments of each call of a stand-in."""
  log = Path(f"{path}.calls")
  lines = log.read_text().splitlines() if log.exists() else []
  return [line.rstrip("\t").split("\t") for line in lines]


def run_task(folder, name, variables, status=0):
  """Runs a task's program as SkyPilot does; returns the program's arguments."""
  python = folder / ".venv/bin/python"
  stand_in(python, status=status)
  environment = os.environ | ENVIRONMENT | variables
  command = ["bash", "-c", read_task(name)["run"]]
  assert subprocess.run(command, cwd=folder, env=environment).returncode == status
  (arguments,) = calls(python)
  return arguments


@pytest.mark.parametrize(
  ("name", "status"),
  [(name, 0) for name in TASKS] + [(TASKS[0], program.INTERRUPTED_STATUS)],
)
def test_task_runs_the_program(tmp_path, name, status, run_program):
  task = read_task(name)
  # A run that saved goes on, and one that failed does not.
  assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [
    program.INTERRUPTED_STATUS
  ]
  defaults = {key: value for key, value in task["envs"].items() if value}
  arguments = run_task(tmp_path, name, defaults | ENVIRONMENT, status)
  assert arguments[:4] == [
    *("-m", "experiments.imagenet", "--workdir=gs://bucket/run"),
    "--config.train.data_dir=/data",
  ]
  workdir, data_dir = f"--workdir={tmp_path / 'run'}", tmp_path / "none"
  flags = [workdir, f"--config.train.data_dir={data_dir}", *arguments[4:]]
  done = run_program(["experiments.imagenet", *flags], status=1)
  # All that is wrong is that there is no ImageNet here.
  assert done.stderr.startswith("error: ") and str(data_dir) in done.stderr


def test_gpu_hosts_find_each_other(tmp_path):
  hosts = {"NUM_NODES": "2", "NODE_RANK": "1", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
  variables = {f"SKYPILOT_{name}": value for name, value in hosts.items()}
  assert run_task(tmp_path, "gpu.yaml", variables | {"FLAGS": ""})[-3:] == [
    "--coordinator_address=10.0.0.1:8476",
    "--num_processes=2",
    "--process_id=1",
  ]


def run_batch_script(folder, status, **variables):
  """Runs it where srun ends with a status; returns its result and all calls."""
  stand_in(folder / "srun", status=status)
  stand_in(folder / "scontrol")
  path = os.pathsep.join([str(folder), os.environ["PATH"]])
  slurm = {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64"}
  result = subprocess.run(
    ["bash", str(SBATCH), "experiments.train", "--workdir=/shared/run"],
    env=os.environ | slurm | variables,
    cwd=folder,
    capture_output=True,
    text=True,
  )
  return result, calls(folder / "srun"), calls(folder / "scontrol")


@pytest.mark.parametrize(
  ("status", "restarts", "requeues"),
  [
    (0, 0, False),
    (program.USAGE_ERROR_STATUS, 0, False),
    (program.DIVERGED_STATUS, 0, False),
    (program.INTERRUPTED_STATUS, 10, True),
    (program.LOST_PROCESS_STATUS, 0, True),
    # It does not go round in circles.
    (program.LOST_PROCESS_STATUS, 10, False),
    # JAX's runtime aborts, because another process was lost.
    (134, 0, True),
    # Killed, for memory or by hand.
    (137, 0, False),
  ],
)
def test_batch_script_goes_on_or_stops(status, restarts, requeues, tmp_path):
  result, (srun,), scontrol = run_batch_script(
    tmp_path, status, SLURM_RESTART_COUNT=str(restarts)
  )
  assert result.returncode == status
  command = [".venv/bin/python", "-m", "experiments.train", "--workdir=/shared/run"]
  assert srun[-4:] == command
  assert "--cpus-per-task=64" in srun
  assert scontrol == ([["requeue", "7"]] if requeues else [])
