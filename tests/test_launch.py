"""The files of launch/: their scripts do their work.

No cloud and no Slurm: programs that stand in for theirs record how they were called.
"""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

from experiments import program

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
TASKS = sorted(path.name for path in LAUNCH.glob("*.yaml"))
SBATCH = LAUNCH / "slurm.sbatch"
ENVIRONMENT = {"WORKDIR": "gs://bucket/run", "DATA": "gs://bucket/data"}


def read_task(name):
  return yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TASKS)
def test_run_that_saved_goes_on_and_one_that_failed_does_not(name):
  recovery = read_task(name)["resources"]["job_recovery"]
  assert recovery["recover_on_exit_codes"] == [program.INTERRUPTED_STATUS]
  assert "max_restarts_on_errors" not in recovery


@pytest.mark.parametrize(
  ("name", "script"),
  [
    *((name, part) for name in TASKS for part in ("setup", "run")),
    (SBATCH.name, None),
    ("../.ci/run", None),
  ],
)
def test_shellcheck_finds_nothing(name, script):
  if shutil.which("shellcheck") is None:
    pytest.skip("no shellcheck: apt install shellcheck")
  text = read_task(name)[script] if script else (LAUNCH / name).read_text()
  result = subprocess.run(
    ["shellcheck", "--shell=bash", "-"], input=text, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stdout


def stand_in(path, *, status=0):
  """Writes a program that appends its arguments, a line each call, to a file beside."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(
    f'#!/usr/bin/env bash\nprintf "%s\\t" "$@" >> "$0.calls"\n'
    f'echo >> "$0.calls"\nexit {status}\n'
  )
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def calls(path):
  """Returns the arguments of each call of a stand-in."""
  log = Path(f"{path}.calls")
  lines = log.read_text().splitlines() if log.exists() else []
  return [line.rstrip("\t").split("\t") for line in lines]


@pytest.mark.parametrize(
  ("name", "status"),
  [(name, 0) for name in TASKS] + [(TASKS[0], program.INTERRUPTED_STATUS)],
)
def test_task_runs_the_program(tmp_path, name, status):
  python = tmp_path / ".venv/bin/python"
  stand_in(python, status=status)
  task = read_task(name)
  variables = {name: value for name, value in task["envs"].items() if value is not None}
  variables |= ENVIRONMENT | {
    "SKYPILOT_NUM_NODES": "1",
    "SKYPILOT_NODE_RANK": "0",
    "SKYPILOT_NODE_IPS": "10.0.0.1",
  }
  result = subprocess.run(
    ["bash", "-c", task["run"]], cwd=tmp_path, env=os.environ | variables
  )
  assert result.returncode == status
  assert calls(python) == [
    [
      *("-m", "experiments.imagenet", "--workdir=gs://bucket/run"),
      "--config.train.data_dir=/data",
      "--config.methods=('regularized_skipinit',)",
      "--config.batch_sizes=(1024,)",
    ]
  ]


def test_gpu_hosts_find_each_other(tmp_path):
  python = tmp_path / ".venv/bin/python"
  stand_in(python)
  variables = ENVIRONMENT | {
    "FLAGS": "",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
  }
  subprocess.run(
    ["bash", "-c", read_task("gpu.yaml")["run"]],
    cwd=tmp_path,
    env=os.environ | variables,
    check=True,
  )
  (arguments,) = calls(python)
  assert arguments[-3:] == [
    "--coordinator_address=10.0.0.1:8476",
    "--num_processes=2",
    "--process_id=1",
  ]


def test_flags_are_those_of_the_program(run_program, tmp_path):
  texts = [read_task(name)["run"] + read_task(name)["envs"]["FLAGS"] for name in TASKS]
  texts += [(ROOT / "docs/launch.md").read_text(encoding="utf-8")]
  used = {name for text in texts for name in re.findall(r"--(config\.[\w.]+)", text)}
  values = {
    "config.train.data_dir": str(tmp_path),
    "config.train.checkpoint_every_seconds": "60",
    "config.methods": "('regularized_skipinit',)",
    "config.batch_sizes": "(1024,)",
  }
  assert used == values.keys()
  flags = [f"--{name}={value}" for name, value in values.items()]
  done = run_program(
    ["experiments.imagenet", f"--workdir={tmp_path / 'run'}", *flags], status=1
  )
  # All that is wrong is that there is no ImageNet here.
  assert done.stderr.startswith("error: ")
  assert f"data_dir='{tmp_path}'" in done.stderr

  defined = run_program(["experiments.imagenet", "--help"]).stdout
  for name in ("coordinator_address", "num_processes", "process_id"):
    assert f"--{name}=" in read_task("gpu.yaml")["run"]
    assert f"  --{name}=" in defined


@pytest.mark.parametrize("name", TASKS)
def test_extras_exist(name):
  (extras,) = re.findall(r"'\.\[([\w,]+)\]'", read_task(name)["setup"])
  setup = (ROOT / "setup.py").read_text(encoding="utf-8")
  for extra in extras.split(","):
    assert f'"{extra}": [' in setup


@pytest.fixture
def sbatch(tmp_path):
  """Runs the batch script where srun ends with a status; returns it and the calls."""

  def run(
    status, arguments=("experiments.train", "--workdir=/shared/run"), **variables
  ):
    stand_in(tmp_path / "srun", status=status)
    stand_in(tmp_path / "scontrol")
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    result = subprocess.run(
      ["bash", str(SBATCH), *arguments],
      env=os.environ
      | {"PATH": path, "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64"}
      | variables,
      cwd=tmp_path,
      capture_output=True,
      text=True,
    )
    return result, calls(tmp_path / "srun"), calls(tmp_path / "scontrol")

  return run


@pytest.mark.parametrize(
  ("status", "requeues"),
  [
    (0, False),
    (program.USAGE_ERROR_STATUS, False),
    (program.DIVERGED_STATUS, False),
    (program.INTERRUPTED_STATUS, True),
    (program.LOST_PROCESS_STATUS, True),
    # JAX's runtime aborts, because another process was lost.
    (134, True),
    # Killed, for memory or by hand.
    (137, False),
  ],
)
def test_batch_script_goes_on_or_stops(sbatch, status, requeues):
  result, (srun,), scontrol = sbatch(status)
  assert result.returncode == status
  command = [".venv/bin/python", "-m", "experiments.train", "--workdir=/shared/run"]
  assert srun[-4:] == command
  assert "--cpus-per-task=64" in srun
  assert scontrol == ([["requeue", "7"]] if requeues else [])


@pytest.mark.parametrize(
  ("status", "requeues"),
  [(program.INTERRUPTED_STATUS, True), (program.LOST_PROCESS_STATUS, False)],
)
def test_batch_script_does_not_go_round_in_circles(sbatch, status, requeues):
  result, _, scontrol = sbatch(status, SLURM_RESTART_COUNT="10")
  assert result.returncode == status
  assert bool(scontrol) == requeues
  assert ("not started again" in result.stderr) == (not requeues)


def test_batch_script_without_arguments_says_what_to_give(sbatch):
  result, srun, scontrol = sbatch(0, arguments=())
  assert (result.returncode, srun, scontrol) == (1, [], [])
  assert "sbatch launch/slurm.sbatch MODULE" in result.stderr
