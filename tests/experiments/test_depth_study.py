"""The depth study from its flags to its files."""

import json
import signal
import time
from pathlib import Path

import pytest

SMALL = [
  "experiments.depth_study",
  "--config.methods=('skipinit',)",
  "--config.wide_resnet_depths=()",
  "--config.residual_mlp_depths=(2,)",
  "--config.residual_mlp_learning_rates=(0.1, 1e9)",
  "--config.residual_mlp.width=16",
]


def test_study_writes_its_tables_and_is_not_repeated(run_program, tmp_path):
  command = [*SMALL, f"--workdir={tmp_path}", "--config.residual_mlp.epochs=2"]
  first = run_program(command, status=0)
  assert "diverged at step" in first.stdout
  study = json.loads((tmp_path / "results.json").read_text())
  (cell,) = study["cells"]
  assert (cell["learning_rate"], cell["num_diverged"], cell["trains"]) == (0.1, 1, True)
  for kind in ("csv", "md", "png"):
    assert (tmp_path / f"results.{kind}").stat().st_size > 0
  results = list(tmp_path.glob("trials/**/result.json"))
  assert len(results) == 2
  times = [path.stat().st_mtime_ns for path in results]
  run_program([*command, "--workers=1"], status=0)
  assert [path.stat().st_mtime_ns for path in results] == times


@pytest.mark.parametrize("workers", [1, 2])
def test_interrupted_study_goes_on(start_program, run_program, tmp_path, workers):
  command = [
    *SMALL,
    f"--workdir={tmp_path}",
    f"--workers={workers}",
    "--config.residual_mlp.epochs=300",
    "--config.residual_mlp_learning_rates=(0.01, 0.02)",
  ]
  process = start_program(command)
  deadline = time.monotonic() + 120
  while not list(tmp_path.glob("trials/**/metrics.jsonl")):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 4, output
  assert "the same command goes on" in output
  assert not (tmp_path / "results.json").exists()
  run_program(command, status=0)
  assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 1


@pytest.mark.parametrize(
  ("flag", "words"),
  [
    ("--config.methods=('skipint',)", "did you mean 'skipinit'"),
    ("--config.residual_mlp.l2=-1", "l2 is -1.0"),
    ("--workers=0", "num_workers is 0"),
    ("--config.residual_mlp.widht=3", "did you mean '--config.residual_mlp.width'"),
  ],
)
def test_bad_input_is_one_sentence(run_program, tmp_path, flag, words):
  workdir = tmp_path / "study"
  result = run_program([*SMALL, f"--workdir={workdir}", flag], status=1)
  assert words in result.stderr
  assert "Traceback" not in result.stderr
  assert not workdir.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_before_any_trial_begins(start_program, tmp_path, number):
  process = start_program([*SMALL, f"--workdir={tmp_path}", "--workers=2"])
  deadline = time.monotonic() + 120
  # Its processes are just starting.
  while not children(process.pid):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.02)
  process.send_signal(number)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 4, output
  assert "Traceback" not in output


def children(pid):
  # The workers, not the tracker process that multiprocessing starts first.
  found = []
  for task in Path(f"/proc/{pid}/task").glob("*/children"):
    for child in task.read_text().split():
      if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
        found.append(child)
  return found
