"""The pages with snippets: these run, and the pages' numbers are what they print.

A snippet asserts what holds exactly; what it prints is compared with the page here.
"""

import dataclasses
import importlib.util
import re
import sys
import tempfile

import optax
import pytest

from skipinit_jax import data, models, training
from skipinit_jax.errors import UsageError
from skipinit_jax.training.metrics import read_metrics
from tests.forks import ROOT

DOCS = ROOT / "docs"
FOLDER = DOCS / "how_to"

# By page: a name of its snippets, what the page says of it, and how far it may be
# from that. Rounding differs between machines, and training amplifies it.
CLAIMS = {
  "how_to/per_example_gradients": [
    ("norms.min()", "between 8.9 and", 8.9, 0.1),
    ("norms.max()", "and 15.1", 15.1, 0.1),
    ("change", "changes by 28 %", 0.28, 0.03),
  ],
  "how_to/differential_privacy": [
    ("accuracy", "names 78 % of", 0.78, 0.1),
    ("of_skipinit", "by 1.0 with SkipInit", 1.0, 0.3),
    ("of_batch_norm", "by 2.4 with batch", 2.4, 0.1),
  ],
  "how_to/batch_size_one": [
    ("skipinit", "names 82 % of", 0.82, 0.08),
    ("as_trained", "50 % of", 0.5, 0.15),
    ("evaluated", "and 18 % in", 0.18, 0.17),
  ],
  "how_to/same_logits_in_any_batch": [
    ("by_company", "differ by 52 %", 0.52, 0.03),
    ("by_mode", "35 % between", 0.35, 0.03),
  ],
  "how_to/own_network": [
    ("verdict.alpha", "at 0.12 times its", 0.12, 0.01),
    ("repaired.changes[0].factor", "times 0.12` or", 0.12, 0.03),
    ("losses[0]", "from 2.4 at", 2.4, 0.1),
    ("losses[-1]", "is 2.0, from", 2.0, 0.1),
  ],
  "how_to/own_normalizer": [
    ("of_rms", "has 0.008 of", 0.008, 0.003),
    ("of_center", "and 0.93 with", 0.93, 0.2),
  ],
  "how_to/own_method": [],
  "how_to/own_dataset": [("result.test_accuracy", "tells 98 % of", 0.98, 0.05)],
  "how_to/fine_tuning": [
    ("from_weights", "it tells 78 % of", 0.78, 0.06),
    ("from_scratch", "from scratch, 69 %", 0.69, 0.08),
  ],
  "how_to/own_run": [("result.test_accuracy", "tells 86 % of", 0.86, 0.08)],
  "how_to/resume": [],
  "how_to/transformer": [],
  "how_to/from_nnx": [],
  "getting_started": [("ratio", "prints 0.008. It", 0.008, 0.001)],
}
WITHOUT_SNIPPETS = {"how_to/many_machines", "how_to/what_survives"}


@pytest.fixture(autouse=True)
def forget_registered(monkeypatch):
  monkeypatch.setattr(data.datasets, "_registered", {})
  monkeypatch.setattr(models.registry, "_KINDS", dict(models.registry._KINDS))


class StandIn:
  """For a logger that is not installed: what pages call of it, and what it was told."""

  def __init__(self, *_, **__):
    self.rows = []

  init = classmethod(lambda cls, **_: cls())

  def log(self, values, *, step):
    self.rows.append((step, values))

  def log_metrics(self, values, *, step):
    # As MLflow: numbers alone.
    self.rows.append((step, {name: float(values[name]) for name in values}))

  def finish(self):
    pass


@pytest.fixture(autouse=True)
def loggers(monkeypatch):
  for name in ("wandb", "mlflow"):
    if importlib.util.find_spec(name) is None:
      monkeypatch.setitem(sys.modules, name, StandIn())


def read(page):
  return (DOCS / f"{page}.md").read_text(encoding="utf-8")


def snippets(text):
  """Returns the snippets that follow one another: a program has a file of its own."""
  blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
  return [block for block in blocks if not block.startswith("# my_")]


@pytest.mark.parametrize("page", CLAIMS)
def test_snippets_give_the_numbers_of_their_page(page):
  text = read(page)
  names = {}
  blocks = snippets(text)
  assert len(blocks) > 1
  for block in blocks:
    exec(compile(block, f"{page}.md", "exec"), names)
  words = " ".join(text.split())
  for expression, said, value, tolerance in CLAIMS[page]:
    assert said in words
    assert float(eval(expression, names)) == pytest.approx(value, abs=tolerance)
    # What is said is that value.
    number = float(re.findall(r"\d+(?:\.\d+)?", said)[0])
    assert value == pytest.approx(number / 100 if "%" in said else number)


def test_loggers_see_the_rows_that_are_written(monkeypatch):
  logged = StandIn()
  monkeypatch.setitem(sys.modules, "mlflow", logged)
  monkeypatch.setitem(sys.modules, "wandb", StandIn())
  names = {}
  for block in snippets(read("how_to/own_run")):
    # The second block is the run; here it keeps its folder.
    if "wandb" not in block:
      exec(compile(block, "own_run.md", "exec"), names)
  with tempfile.TemporaryDirectory() as folder:
    result = training.train(
      names["config"],
      folder,
      on_metrics=names["log_to_mlflow"],
      show_progress=False,
      optimizer=optax.lion,
    )
    rows = [row for row in read_metrics(folder) if row["kind"] == "eval"]
    with pytest.raises(UsageError, match=r"optimizer is \"optax.*lion\" there and"):
      training.train(names["config"], folder, show_progress=False)
    config = dataclasses.replace(names["config"], l2=0.1)
    with pytest.raises(UsageError, match=r"l2 is 0.1: .*lion does not see it"):
      training.train(config, folder, optimizer=optax.lion, show_progress=False)
  assert result.config["optimizer"].endswith("lion")
  seen = [(step, values) for step, values in logged.rows if "eval/accuracy" in values]
  assert [step for step, _ in seen] == [row["step"] for row in rows] == [23, 46, 69]
  assert [values["eval/accuracy"] for _, values in seen] == [
    row["accuracy"] for row in rows
  ]


def test_program_with_a_method_of_its_own_runs_a_study(run_program, tmp_path):
  text = read("how_to/own_method")
  (program,) = re.findall(r"```python\n(# my_study.py\n.*?)```", text, flags=re.DOTALL)
  (tmp_path / "my_study.py").write_text(program)
  run_program(
    [
      "my_study",
      f"--workdir={tmp_path / 'study'}",
      "--workers=1",
      "--config.methods=('small',)",
      "--config.residual_mlp_depths=(4,)",
      "--config.wide_resnet_depths=()",
      "--config.residual_mlp.width=16",
      "--config.residual_mlp.epochs=1",
      "--config.residual_mlp_search.learning_rates=(0.03,)",
    ],
    env={"PYTHONPATH": str(tmp_path)},
    status=0,
  )
  table = (tmp_path / "study/accuracy.md").read_text(encoding="utf-8")
  assert "| network | SkipInit, α = 0.01 |" in table


def test_all_pages_are_tested():
  pages = {f"how_to/{path.stem}" for path in FOLDER.glob("*.md")}
  assert pages <= {*CLAIMS, *WITHOUT_SNIPPETS}
