"""The site: built with warnings as errors, complete, and without dead ends."""

import html.parser
import importlib
import json
import pkgutil
import re
import urllib.parse
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import skipinit_jax

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
REPOSITORY = "https://github.com/OWNER/skipinit_jax"


@pytest.fixture(scope="module")
def site(tmp_path_factory, run_program):
  """The folder of the site, built as `make docs` does."""
  folder = tmp_path_factory.mktemp("site")
  flags = ["--fail-on-warning", "--keep-going", "--quiet", "--nitpicky"]
  paths = [str(DOCS), str(folder / "html")]
  run_program(["sphinx", *flags, "--doctree-dir", str(folder), *paths], status=0)
  return folder / "html"


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
  assert 'class="math notranslate' in text
  assert "$" not in re.sub(r"<[^>]*>", "", text)


def test_signatures_are_as_they_are_written(site):
  text = (site / "api/models.html").read_text(encoding="utf-8")
  visible = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", text))
  for written in (
    "activation: Activation = nn.relu",
    "dtype: jax.typing.DTypeLike | None = None",
    "kernel_init: Initializer = he_normal",
  ):
    assert written in visible
  for path in (site / "api").glob("*.html"):
    text = path.read_text(encoding="utf-8")
    for evaluated in (" at 0x", "jaxlib", "object>", "_Sentinel"):
      assert evaluated not in re.sub(r"<[^>]*>", "", text), (path.name, evaluated)


def test_notebooks_are_pages_with_their_stored_outputs(site, pages):
  names = [path.stem for path in (ROOT / "colabs").glob("*.ipynb")]
  assert len(names) > 2
  for name in names:
    page = site / f"tutorials/{name}.html"
    # Addresses of pages in the repository became links within the site.
    assert any(link.startswith("../") for link in pages[page].links)
    notebook = json.loads((ROOT / f"colabs/{name}.ipynb").read_text(encoding="utf-8"))
    printed = [
      line.strip()
      for cell in notebook["cells"]
      for output in cell.get("outputs", ())
      for line in output.get("text", ())
    ]
    visible = html.unescape(page.read_text(encoding="utf-8"))
    assert printed and all(line in visible for line in printed)
