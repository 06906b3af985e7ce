"""The site: built with warnings as errors, complete, and without dead ends."""

import html.parser
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import skipinit_jax

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
REPOSITORY = "https://github.com/OWNER/skipinit_jax"
# Words in a row that two pages may share, such as the title of the paper.
MOST_SHARED_WORDS = 24


def build(source, output, environment):
  """Builds a site as `make docs` does."""
  arguments = ["--fail-on-warning", "--keep-going", "--quiet", "--nitpicky"]
  arguments += ["--doctree-dir", str(output) + "_doctrees", str(source), str(output)]
  done = subprocess.run(
    [sys.executable, "-m", "sphinx", *arguments],
    cwd=ROOT,
    env=environment | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return output


@pytest.fixture(scope="module")
def site(tmp_path_factory, child_environment):
  folder = tmp_path_factory.mktemp("site")
  return build(DOCS, folder / "html", child_environment())


class Page(html.parser.HTMLParser):
  """Collects a page's links, images and anchors."""

  def __init__(self, path):
    super().__init__()
    self.links, self.images, self.anchors = [], [], set()
    self.feed(path.read_text(encoding="utf-8"))

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    if "id" in attributes:
      self.anchors.add(attributes["id"])
    if tag == "a" and "href" in attributes:
      self.links.append(attributes["href"])
    if tag == "img":
      self.images.append((attributes["src"], attributes.get("alt", "")))


@pytest.fixture(scope="module")
def pages(site):
  return {path: Page(path) for path in site.rglob("*.html")}


def sources():
  """Names of the pages: paths in docs/ without their endings."""
  found = [path for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb")]
  # Path.rglob does not follow the link to the notebooks.
  found += list((DOCS / "tutorials").glob("*.ipynb"))
  names = {path.relative_to(DOCS).with_suffix("").as_posix() for path in found}
  return {name for name in names if not name.startswith("_")}


def test_every_page_is_in_the_navigation(site, pages):
  home = {link.partition("#")[0] for link in pages[site / "index.html"].links}
  assert len(sources()) > 30
  missing = {name for name in sources() if f"{name}.html" not in home}
  assert missing - {"index"} == set()


def test_every_public_name_has_an_entry(site):
  inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
  entries = {
    name
    for domain in inventory.data
    for name in inventory.data[domain]
    if "py:" in domain
  }
  names = []
  for found in pkgutil.walk_packages(skipinit_jax.__path__, "skipinit_jax."):
    module = importlib.import_module(found.name)
    names += [f"{found.name}.{name}" for name in getattr(module, "__all__", ())]
  assert len(names) > 200
  # Without documentation there is no entry either.
  assert [name for name in names if name not in entries] == []


def test_links_lead_somewhere(site, pages):
  dead, inside, outside = [], 0, 0
  for path, page in pages.items():
    for link in page.links:
      parts = urllib.parse.urlsplit(link)
      if link.startswith(REPOSITORY):
        kind, branch, file = parts.path.split("/", 5)[3:]
        target = ROOT / urllib.parse.unquote(file)
        found = target.is_dir() if kind == "tree" else target.is_file()
        outside += 1
        if not found or branch != "main":
          dead.append((path.name, link))
      elif not parts.scheme:
        target = path.parent / urllib.parse.unquote(parts.path) if parts.path else path
        inside += 1
        if not target.resolve().is_relative_to(site) or not target.is_file():
          dead.append((path.name, link))
        elif parts.fragment and target.suffix == ".html":
          anchors = pages[target.resolve()].anchors
          if urllib.parse.unquote(parts.fragment) not in anchors:
            dead.append((path.name, link))
  assert dead == []
  assert inside > 1000 and outside > 30


def test_pictures_are_there_and_described(site, pages):
  seen = 0
  for path, page in pages.items():
    if path.name == "py-modindex.html":  # Sphinx's own, without a picture.
      continue
    for source, description in page.images:
      if source.startswith("https://colab.research.google.com/assets/"):
        continue
      assert (path.parent / urllib.parse.unquote(source)).is_file(), (path.name, source)
      # What a notebook draws is described in its text only.
      if path.parent.name != "tutorials":
        assert len(description.split()) > 4, (path.name, source)
      seen += 1
  assert seen > 15


def test_formulas_are_formulas(site):
  text = (site / "concepts.html").read_text(encoding="utf-8")
  assert len(re.findall(r'class="math notranslate', text)) > 20
  assert "MathJax" in text or "mathjax" in text
  visible = re.sub(r"<[^>]*>", "", text)
  assert "$" not in visible


def test_signatures_are_as_they_are_written(site):
  text = (site / "api/models.html").read_text(encoding="utf-8")
  visible = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", text))
  for written in (
    "activation: Activation = nn.relu",
    "dtype: jax.typing.DTypeLike | None = None",
    "kernel_init: jax.nn.initializers.Initializer = he_normal",
  ):
    assert written in visible
  for path in (site / "api").glob("*.html"):
    text = path.read_text(encoding="utf-8")
    for evaluated in (" at 0x", "jaxlib", "object>", "_Sentinel"):
      assert evaluated not in re.sub(r"<[^>]*>", "", text), (path.name, evaluated)


NOTEBOOK = {
  "cells": [
    {
      "cell_type": "markdown",
      "id": "0",
      "metadata": {},
      "source": [
        "# One notebook\n",
        "\n",
        "See [a](../docs/index.md), [b](../docs/index.md#home), [what is\n",
        f"split]({REPOSITORY}/blob/main/docs/getting_started.md).\n",
      ],
    },
    {
      "cell_type": "code",
      "id": "1",
      "execution_count": 1,
      "metadata": {},
      "source": ["print(6 * 7)"],
      "outputs": [{"name": "stdout", "output_type": "stream", "text": ["forty-two\n"]}],
    },
  ],
  "metadata": {
    "kernelspec": {"name": "python3", "display_name": "Python 3"},
    "language_info": {"name": "python", "pygments_lexer": "ipython3"},
  },
  "nbformat": 4,
  "nbformat_minor": 5,
}


def test_notebooks_are_pages_with_their_stored_outputs(tmp_path, child_environment):
  docs = tmp_path / "docs"
  docs.mkdir()
  for name in ("conf.py", "tutorials.md", "getting_started.md"):
    shutil.copy(DOCS / name, docs)
  shutil.copytree(DOCS / "_extensions", docs / "_extensions")
  shutil.copy(DOCS / "tutorials", docs / "tutorials", follow_symlinks=False)
  # Links to pages that are not copied would be warnings.
  for name in ("tutorials.md", "getting_started.md"):
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", (docs / name).read_text())
    (docs / name).write_text(text)
  (tmp_path / "colabs").mkdir()
  (tmp_path / "colabs/one.ipynb").write_text(json.dumps(NOTEBOOK))
  # Its text, which is no page.
  (tmp_path / "colabs/one.py").write_text("# %% [markdown]\n# # One notebook\n")
  (docs / "index.md").write_text(
    "# Home\n\n[one](../colabs/one.ipynb)\n\n"
    "```{toctree}\n:glob:\n\ngetting_started\ntutorials**\n```\n"
  )
  output = build(docs, tmp_path / "html", child_environment())
  home = Page(output / "index.html")
  assert home.links.count("tutorials/one.html") > 1  # in the text and the navigation
  links = Page(output / "tutorials/one.html").links
  assert {"../index.html", "../index.html#home"} <= set(links)
  assert links.count("../getting_started.html") > 1
  assert "forty-two" in (output / "tutorials/one.html").read_text(encoding="utf-8")


def words_of(path):
  """Returns the words of a page's sentences, without code and tables."""
  text = re.sub(r"```.*?```", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
  lines = [line for line in text.splitlines() if not line.startswith("|")]
  return re.sub(r"\]\([^)]*\)", "]", "\n".join(lines)).split()


def test_no_page_repeats_another():
  written = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
  written += [
    DOCS / f"{name}.md" for name in sources() if (DOCS / f"{name}.md").exists()
  ]
  first, repeated = {}, []
  for path in written:
    words = words_of(path)
    for start in range(len(words) - MOST_SHARED_WORDS):
      passage = tuple(words[start : start + MOST_SHARED_WORDS + 1])
      if first.setdefault(passage, path) != path:
        repeated.append((path.name, first[passage].name, " ".join(passage)))
  assert repeated == []
