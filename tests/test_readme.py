"""The README's example, tables and numbers."""

import re
from pathlib import Path

import pytest

from skipinit_jax import methods, studies

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_example_runs():
  (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
  names: dict[str, object] = {}
  exec(compile(example, "README.md", "exec"), names)
  assert names["logits"].shape == (4, 10)
  network = names["MyNetwork"]()
  output, _ = network.init_with_output(names["jax"].random.key(0), names["images"])
  assert output.shape == (4, 10)


def test_table_of_methods_is_complete():
  names = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
  assert tuple(names) == methods.NAMES


@pytest.mark.parametrize("name", ["demo", "digits", "fashion_mnist"])
def test_results_are_those_of_the_study(name):
  table = studies.accuracy_table(studies.read_results(ROOT / "results" / name))
  assert studies.markdown(table) in README


def test_files_and_folders_exist():
  links = re.findall(r"\]\(([^)#:]+)\)", README)
  places = re.findall(r"^\| `([\w/.]+)` \|", README, flags=re.MULTILINE)
  paths = links + [place for place in places if "/" in place]
  assert len(paths) > 9
  assert [path for path in paths if not (ROOT / path).exists()] == []
