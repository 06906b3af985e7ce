"""The README's example, the table of methods, links and version."""

import re
from pathlib import Path

import skipinit_jax
from skipinit_jax import methods

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_example_runs(capsys):
  (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
  # A network as deep as that takes most of a minute to compile.
  assert "WideResNet(100, 2," in example
  example = example.replace("WideResNet(100, 2,", "WideResNet(10, 1,")
  names: dict[str, object] = {}
  exec(compile(example, "README.md", "exec"), names)
  assert names["logits"].shape == (4, 10)
  assert capsys.readouterr().out.startswith("The signal passes all 3 blocks")
  for block in (names["block"], names["normalized"]):
    features = names["jax"].numpy.ones((1, 4, 4, 64))
    output, _ = block.init_with_output(names["jax"].random.key(0), features)
    assert output.shape == features.shape


def test_table_of_methods_is_complete():
  page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
  names = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)
  assert tuple(names) == methods.NAMES


def test_links_and_folders_lead_somewhere():
  links = [
    link
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
    for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text("utf-8"))
  ]
  contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
  places = re.findall(r"^\| `([\w.]*/[\w/.]*)` \|", contributing, flags=re.MULTILINE)
  assert len(places) > 9
  assert [path for path in links + places if not (ROOT / path).exists()] == []


def test_version():
  (version,) = re.findall(r'version="(.*)"', (ROOT / "setup.py").read_text("utf-8"))
  assert skipinit_jax.__version__ == version
  assert f"version: {version}" in (ROOT / "CITATION.cff").read_text("utf-8")
