"""The program that makes reports of studies and of runs."""

import platform
import subprocess

from skipinit_jax import studies
from skipinit_jax.files import read_json
from skipinit_jax.studies import DepthStudyConfig, SearchConfig, depth_study
from skipinit_jax.studies.results import write_results
from tests.studies.results import run_study

REPORT = ["experiments.report"]


def test_report_of_a_study_from_its_results_alone(run_program, tmp_path):
  config = DepthStudyConfig(
    methods=("skipinit", "skipinit_one"),
    residual_mlp_depths=(2,),
    residual_mlp_search=SearchConfig((0.125,), extend=False, num_seeds=1, best_of=1),
  )
  results = run_study(
    depth_study(config),
    lambda labels, rate, seed: 0.875 if labels.method == "skipinit" else None,
  )
  write_results(results, tmp_path)
  output = tmp_path / "new" / "report"
  done = run_program([*REPORT, f"--workdir={tmp_path}", f"--output={output}"], status=0)
  assert f"Report: {output / 'report.html'}, with its tables" in done.stdout
  assert "87.5, 2⁻³" in done.stdout
  assert "[holds] SkipInit, α = 0 trains at every depth.\n" in done.stdout
  page = (output / "report.html").read_text()
  assert "87.5, 2⁻³" in page and results.command in page
  assert (output / "accuracy_by_depth.png").stat().st_size > 0
  # NaN among them, the results are the same again, and so is the report.
  written = {path.name: path.read_bytes() for path in output.iterdir()}
  assert written["results.json"] == (tmp_path / "results.json").read_bytes()
  again = tmp_path / "again"
  studies.write_report(studies.read_results(output), again)
  assert {path.name: path.read_bytes() for path in again.iterdir()} == written


def test_report_of_a_run(trained_run, run_program, tmp_path):
  accuracy = read_json(trained_run / "result.json")["test_accuracy"]
  flags = [f"--workdir={trained_run}", f"--output={tmp_path}"]
  done = run_program([*REPORT, *flags], status=0)
  assert f"{100 * accuracy:.2f}" in done.stdout
  page = (tmp_path / "report.html").read_text()
  for name in ("result", "learning_curves", "signal", "environment"):
    assert f'<h3 id="{name}">' in page
  record = (tmp_path / "environment.md").read_text()
  assert f"python -m experiments.train '--workdir={trained_run}'" in record
  assert " --config.profile_steps=2" in record and platform.python_version() in record
  head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
  assert not head.returncode and head.stdout.strip() in record
  assert (tmp_path / "signal.png").stat().st_size > 0
