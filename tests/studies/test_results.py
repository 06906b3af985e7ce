"""`results.json`: what is written is read again, whoever wrote it."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.studies import (
  DepthStudyConfig,
  SearchConfig,
  depth_study,
  read_results,
)
from skipinit_jax.studies.results import write_results
from tests.studies.results import run_study

RESULTS = Path(__file__).parents[2] / "results"


def test_results_survive_the_file(tmp_path):
  config = DepthStudyConfig(
    residual_mlp_depths=(2,), residual_mlp_search=SearchConfig(num_seeds=2, best_of=2)
  )
  results = run_study(
    depth_study(config),
    lambda labels, rate, seed: None if labels.method == "skipinit_one" else rate / 16,
  )
  runs = [dataclasses.replace(run, test_loss=math.inf) for run in results.runs]
  results = dataclasses.replace(results, runs=runs)
  assert write_results(results, tmp_path) == tmp_path / "results.json"
  # Plain JSON: another program reads it, which knows no NaN.
  text = (tmp_path / "results.json").read_text()
  json.loads(text, parse_constant=lambda name: pytest.fail(name))
  read = read_results(str(tmp_path))
  # NaN is not equal to itself; the text of both is.
  assert repr(read) == repr(results)
  (nan,) = {repr(run.train_loss) for run in read.runs if run.status == "diverged"}
  assert nan == "nan"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/results.json")))
def test_committed_results_are_read(path, tmp_path):
  results = read_results(path.parent)
  labels = [dataclasses.asdict(search.labels) for search in results.searches]
  expected = json.loads(path.read_text())["searches"]
  assert labels == [search["labels"] for search in expected]


def error_of(directory):
  with pytest.raises(UsageError) as error:
    read_results(directory)
  return str(error.value)


def test_reading_what_is_no_study(tmp_path):
  message = f"There is neither a study nor a run in {tmp_path}: it has no results.json"
  assert error_of(tmp_path).startswith(message)
  assert error_of(tmp_path / "nowhere").startswith("There is neither a study nor a run")
  (tmp_path / "result.json").write_text("{}")
  message = f"There is no study in {tmp_path}, but a single run."
  assert error_of(tmp_path) == message
  (tmp_path / "results.json").write_text('{"name": ')
  assert "results.json is damaged: it holds no JSON" in error_of(tmp_path)


@pytest.mark.parametrize(
  ("statuses", "finished"),
  [([], 0), (["completed", "diverged"], 2), (["completed", "interrupted"], 1)],
)
def test_reading_an_unfinished_study(tmp_path, statuses, finished):
  # The storage is made first.
  (tmp_path / "study.db").touch()
  for seed, status in enumerate(statuses):
    run = tmp_path / "trials" / "mlp" / "skipinit" / "rate_0.5" / f"seed_{seed}"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"status": status}))
  words = f"The study in {tmp_path} is not finished ({finished} of its runs are)"
  assert error_of(tmp_path).startswith(words)


@pytest.mark.parametrize(
  ("content", "words"),
  [
    ("{}", "holds no results of this version's: run the study again"),
    ("[]", "holds no results of this version's"),
    ('{"name": "depth_study", "searches": [1], "runs": []}', "holds no results of"),
    ('{"name": "width_study"}', "Unknown kind of study 'width_study'"),
  ],
)
def test_reading_results_of_something_else(tmp_path, content, words):
  (tmp_path / "results.json").write_text(content)
  assert words in error_of(tmp_path)
