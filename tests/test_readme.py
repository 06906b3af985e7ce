"""The README's example, methods, links and folders; tests/docs has the other pages."""

import re
from pathlib import Path

import pytest

from skipinit_jax import methods

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def test_example_runs():
  (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
  # A network as deep as that takes most of a minute to compile.
  assert "WideResNet(100, 2," in example
  example = example.replace("WideResNet(100, 2,", "WideResNet(10, 1,")
  names: dict[str, object] = {}
  exec(compile(example, "README.md", "exec"), names)
  assert names["logits"].shape == (4, 10)
  network = names["MyNetwork"]()
  output, _ = network.init_with_output(names["jax"].random.key(0), names["images"])
  assert output.shape == (4, 10)


def test_table_of_methods_is_complete():
  names = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
  assert tuple(names) == methods.NAMES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
  path = ROOT / page
  links = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
  assert [link for link in links if not (path.parent / link).exists()] == []


def test_files_and_folders_exist():
  places = re.findall(r"^\| `([\w/.]+)` \|", README, flags=re.MULTILINE)
  paths = [place for place in places if "/" in place]
  assert len(paths) > 9
  assert [path for path in paths if not (ROOT / path).exists()] == []
