"""README.md and docs/ show the committed results."""

import json
import re
import shutil

import pytest

from experiments import pages
from skipinit_jax.errors import UsageError
from skipinit_jax.files import read_json
from tests.forks import ROOT


def test_pages_have_the_committed_results():
  assert pages.fill(ROOT, check=True) == []
  written = "".join(
    path.read_text("utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
  )
  shown = {path.name for path in (ROOT / "results").iterdir()}
  assert [name for name in shown if f"results/{name}" not in written] == []


WRONG = "<!-- results: diagnosis/agreement_judged -->0 of 1<!-- end -->"


@pytest.fixture
def copy(tmp_path):
  """A checkout with one page, whose one number is wrong."""
  (tmp_path / "docs").mkdir()
  shutil.copytree(ROOT / "results/diagnosis", tmp_path / "results/diagnosis")
  page = tmp_path / "README.md"
  page.write_text(f"In {WRONG} cells.\n")
  return page


def test_a_page_that_differs(copy):
  message = r"^In README\.md, diagnosis/agreement_judged differ"
  with pytest.raises(UsageError, match=message):
    pages.fill(copy.parent, check=True)
  assert WRONG in copy.read_text()
  assert pages.fill(copy.parent) == [copy]
  cells = read_json(ROOT / "results/diagnosis/diagnosis.json")["cells"]
  judged = [cell for cell in cells if cell["part"] == "judged"]
  right = sum(
    cell["healthy"][name] == cell["trains"][name]
    for cell in judged
    for name in ("SGD", "Adam")
  )
  agreement = f"{right} of {2 * len(judged)}"
  assert copy.read_text() == f"In {WRONG.replace('0 of 1', agreement)} cells.\n"
  assert pages.fill(copy.parent, check=True) == []


def test_notebooks_know_the_address():
  """And lose it again: the notebooks here have none, or the one of pyproject.toml."""
  address = "https://github.com/someone/skipinit_jax"
  path = ROOT / "colabs/run_a_study.ipynb"
  without = pages.link_notebook(path.read_text("utf-8"), path.stem, "")
  linked = pages.link_notebook(without, path.stem, address)
  cells = json.loads(linked)["cells"]
  badge = "https://colab.research.google.com/github/someone/skipinit_jax/blob/main/"
  assert f"]({badge}colabs/run_a_study.ipynb)\n" in cells[0]["source"][2]
  assert f'REPOSITORY = "{address}"\n' in cells[1]["source"]
  assert f"]({address}/blob/main/docs/studies.md)" in "".join(cells[-1]["source"])
  assert pages.link_notebook(linked, path.stem, "") == without


def test_a_result_that_there_is_none_of(copy):
  copy.write_text("<!-- results: diagnosis/agrement -->\n<!-- end -->\n")
  with pytest.raises(UsageError, match=r"'agrement' \(did you mean 'agreement'"):
    pages.fill(copy.parent)


def test_numbers_have_a_source(copy):
  pages.fill(copy.parent)
  filled = copy.read_text()
  total = re.search(r"\d+ of (\d+)", filled)[1]
  sourced = f"It takes {total} seconds, `9 s` of them.\n\n[There](x.md): 3 %.\n"
  copy.write_text(filled + sourced)
  assert pages.fill(copy.parent, check=True) == []
  copy.write_text(f"{filled}\nThat is 12.5 % more, in 1,000 seconds of 5.\n")
  with pytest.raises(UsageError, match=r"README\.md, 12\.5, 1,000 stand outside"):
    pages.fill(copy.parent, check=True)
