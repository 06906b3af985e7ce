"""The depth study from its flags to its results."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

SMALL = [
  "experiments.depth_study",
  "--config.methods=('skipinit',)",
  "--config.wide_resnet_depths=()",
  "--config.residual_mlp_depths=(2,)",
  "--config.residual_mlp.width=16",
]
SEARCH = "--config.residual_mlp_search.learning_rates"


def test_finished_study_is_not_repeated(run_program, tmp_path):
  command = [
    *SMALL,
    f"{SEARCH}=(0.1, 1e9)",
    f"--workdir={tmp_path}",
    "--config.residual_mlp.epochs=2",
  ]
  first = run_program(command, status=0)
  assert "rate 1e+09, seed 0: diverged at step" in first.stderr
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["name"] == "depth_study"
  assert "-m experiments.depth_study" in results["command"]
  assert results["config"]["residual_mlp"]["epochs"] == 2
  (search,) = results["searches"]
  assert search["labels"]["depth"] == 2 and search["labels"]["method"] == "skipinit"
  assert (search["num_runs"], search["num_diverged"]) == (2, 1)
  assert (search["optimum"]["learning_rate"], search["trains"]) == (0.1, True)
  runs = {run["learning_rate"]: run["status"] for run in results["runs"]}
  assert runs == {0.1: "completed", 1e9: "diverged"}

  trials = list(tmp_path.glob("trials/**/result.json"))
  assert len(trials) == 2
  times = [path.stat().st_mtime_ns for path in trials]
  # How many processes there are is not part of a study.
  second = run_program([*command, "--workers=1"], status=0)
  assert "2 trials are done already." in second.stderr
  assert [path.stat().st_mtime_ns for path in trials] == times
  again = json.loads((tmp_path / "results.json").read_text())
  assert again.pop("command") != results.pop("command")
  assert again == results


def test_one_process_is_interrupted_and_goes_on(start_program, run_program, tmp_path):
  command = [
    *SMALL,
    f"{SEARCH}=(0.01, 0.02)",
    f"--workdir={tmp_path}",
    "--workers=1",
    "--config.residual_mlp.epochs=300",
  ]
  process = start_program(command)
  deadline = time.monotonic() + 120
  while not list(tmp_path.glob("trials/**/metrics.jsonl")):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 4, output
  assert "Interrupted and saved: the same command goes on from here." in output
  assert "Traceback" not in output
  assert not (tmp_path / "results.json").exists()
  run_program(command, status=0)
  (search,) = json.loads((tmp_path / "results.json").read_text())["searches"]
  assert (search["num_runs"], search["num_diverged"]) == (2, 0)


def test_bad_input_is_one_sentence(run_program, tmp_path):
  workdir = tmp_path / "study"
  flags = ["--config.methods=('skipint',)", f"--workdir={workdir}"]
  done = run_program(["experiments.depth_study", *flags], status=1)
  assert done.stderr.startswith("error: Unknown method 'skipint' (did you mean 'skipin")
  assert done.stderr.count("\n") == 1
  assert done.stdout == ""
  assert not workdir.exists()


def test_unreachable_database_is_one_sentence(run_program, tmp_path):
  url = "postgresql+psycopg://me:secret@127.0.0.1:1/studies"
  result = run_program([*SMALL, f"--workdir={tmp_path}", f"--storage={url}"], status=1)
  assert result.stderr.startswith("error: The study's database postgresql+psycopg://me")
  assert "refused" in result.stderr
  assert result.stderr.count("\n") == 1
  assert "secret" not in result.stdout + result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_before_any_trial_begins(start_program, tmp_path, number):
  process = start_program([*SMALL, f"--workdir={tmp_path}", "--workers=2"])
  deadline = time.monotonic() + 120
  # Its processes are just starting.
  while not (workers := children(process.pid)):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.02)
  if number == signal.SIGINT:
    # A terminal interrupts them too, in the middle of their imports.
    time.sleep(1)
    for worker in workers:
      os.kill(worker, number)
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
        found.append(int(child))
  return found
