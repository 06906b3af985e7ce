"""The README's example, methods, links and version; tests/docs has the other pages."""

import re
from pathlib import Path

import skipinit_jax
from skipinit_jax import methods

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_links_and_folders_lead_somewhere():
  links = [
    link
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text("utf-8"))
  ]
  places = re.findall(r"^\| `([\w.]*/[\w/.]*)` \|", README, flags=re.MULTILINE)
  assert len(places) > 9
  assert [path for path in links + places if not (ROOT / path).exists()] == []


def test_version():
  (version,) = re.findall(r'version="(.*)"', (ROOT / "setup.py").read_text("utf-8"))
  assert skipinit_jax.__version__ == version
  assert f"version: {version}" in (ROOT / "CITATION.cff").read_text("utf-8")
