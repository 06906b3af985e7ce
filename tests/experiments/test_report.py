"""The report of a study or a run, on the terminal and in files."""

import json
import math
import shutil

import pytest

from skipinit_jax.studies import DepthStudyConfig, Run, SearchConfig, depth_study
from skipinit_jax.studies.study import missing_runs, summarize, write_results


@pytest.fixture
def workdir(tmp_path):
  """A study's directory with its results, one run of which diverged."""
  config = DepthStudyConfig(
    methods=("skipinit", "skipinit_one"),
    residual_mlp_depths=(2,),
    residual_mlp_search=SearchConfig((0.125,), extend=False, num_seeds=1, best_of=1),
  )
  study = depth_study(config)
  runs = {}
  for search, key in missing_runs(study, {}, 0.2):
    diverged = search.labels["method"] == "skipinit_one"
    curve = {"epoch": [1.0], "loss": [0.5], "accuracy": [0.875]}
    runs[key] = Run(
      **key._asdict(),
      status="diverged" if diverged else "completed",
      step=4,
      train_loss=math.nan if diverged else 0.5,
      train_accuracy=math.nan if diverged else 0.9,
      test_loss=None if diverged else 0.5,
      test_accuracy=None if diverged else 0.875,
      history={"train": curve, "test": curve},
      seconds=1.0,
      device="1 x cpu",
      versions={"jax": "0.10.2"},
    )
  workdir = tmp_path / "study"
  workdir.mkdir()
  write_results(summarize(study, runs, 0.2, "python -m x"), workdir)
  return workdir


def report(run_program, *flags, status=0):
  return run_program(["experiments.report", *flags], status=status)


def test_report_and_the_same_again_from_its_own_results(workdir, run_program, tmp_path):
  output = tmp_path / "new" / "report"
  done = report(run_program, f"--workdir={workdir}", f"--output={output}")
  assert f"Report: {output / 'report.html'}, with its tables" in done.stdout
  assert "87.5, 2^-3" in done.stdout
  assert "[holds] SkipInit, α = 0 trains at every depth.\n" in done.stdout
  page = (output / "report.html").read_text()
  assert "87.5, 2^-3" in page and "python -m x" in page
  assert (output / "accuracy.md").exists() and not (output / "accuracy.tex").exists()
  # NaN among them, the results are the same again.
  results = (workdir / "results.json").read_bytes()
  assert (output / "results.json").read_bytes() == results
  assert [path.name for path in workdir.iterdir()] == ["results.json"]

  # Without the study, beside what lies there: the same bytes.
  shutil.rmtree(workdir)
  files = {path.name: path.read_bytes() for path in output.iterdir()}
  report(run_program, f"--workdir={output}")
  assert {path.name: path.read_bytes() for path in output.iterdir()} == files


def test_report_of_a_run(run_program, tmp_path):
  workdir = tmp_path / "a run"
  run_program(
    [
      "experiments.train",
      f"--workdir={workdir}",
      "--config.model=residual_mlp",
      "--config.depth=2",
      "--config.width=8",
      "--config.epochs=1",
      "--config.batch_size=736",
      "--config.signal_every_steps=1",
    ],
    status=0,
  )
  accuracy = json.loads((workdir / "result.json").read_text())["test_accuracy"]
  done = report(run_program, f"--workdir={workdir}")
  assert f"{100 * accuracy:.2f}" in done.stdout
  assert f"Report: {workdir / 'report.html'}, with its tables" in done.stdout
  page = (workdir / "report.html").read_text()
  assert f"python -m experiments.report &#39;--workdir={workdir}&#39;" in page
  for name in ("result", "learning_curves", "signal"):
    assert f'<h3 id="{name}">' in page
  assert (workdir / "signal.png").stat().st_size > 0

  # Elsewhere, it is the same but for the command.
  output = tmp_path / "elsewhere"
  report(run_program, f"--workdir={workdir}", f"--output={output}", "--formats=png,tex")
  assert (output / "signal.png").read_bytes() == (workdir / "signal.png").read_bytes()
  assert (output / "result.tex").exists() and not (output / "result.md").exists()
  assert f"--output={output}" in (output / "report.html").read_text()

  (workdir / "result.json").unlink()
  done = report(run_program, f"--workdir={workdir}", status=1)
  assert done.stdout == ""
  assert done.stderr == (
    f"error: The run in {workdir} is not finished: run the same command again to go "
    "on, then make the report.\n"
  )


def test_bad_input_is_one_sentence(workdir, run_program, tmp_path):
  def refused(*flags):
    done = report(run_program, *flags, status=1)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr

  empty = tmp_path / "empty"
  empty.mkdir()
  assert refused(f"--workdir={empty}") == (
    f"error: There is neither a study nor a run in {empty}: it has no results.json and "
    "no result.json.\n"
  )
  assert list(empty.iterdir()) == []

  unfinished = tmp_path / "unfinished"
  run = unfinished / "trials" / "mlp" / "rate_0.5" / "seed_0"
  run.mkdir(parents=True)
  (run / "result.json").write_text('{"status": "completed"}')
  assert "is not finished (1 of its runs are): run the same command again" in refused(
    f"--workdir={unfinished}"
  )

  file = tmp_path / "file"
  file.write_text("kept")
  assert refused(f"--workdir={workdir}", f"--output={file}") == (
    f"error: The report cannot be written to {file} (File exists): use another "
    "--workdir or --output.\n"
  )
  assert file.read_text() == "kept"

  assert refused(f"--workdir={workdir}", "--formats=md,svg") == (
    "error: Unknown format 'svg': choose one of md, pdf, png, tex.\n"
  )
