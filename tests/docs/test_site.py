"""The site: built with warnings as errors, complete, and without dead ends.

Sphinx itself warns of a page without a place and of a picture that is not there.
"""

import html.parser
import importlib
import pkgutil
import re
import urllib.parse
from unittest import mock

import pytest
from sphinx.util.inventory import InventoryFile

import skipinit_jax
from tests.forks import ROOT

DOCS = ROOT / "docs"
ADDRESS = "https://github.com/someone/skipinit_jax"


@pytest.fixture(scope="module")
def site(tmp_path_factory, run_program):
  """The folder of the site, built as `make docs` does without an address."""
  folder = tmp_path_factory.mktemp("site")
  flags = ["--fail-on-warning", "--keep-going", "--quiet", "--nitpicky"]
  flags += ["--define", "repository_links_address="]
  paths = [str(DOCS), str(folder / "html")]
  run_program(["sphinx", *flags, "--doctree-dir", str(folder), *paths], status=0)
  return folder / "html"


class Page(html.parser.HTMLParser):
  """Collects a page's links and anchors."""

  def __init__(self, path):
    super().__init__()
    self.links, self.anchors = [], set()
    self.text = path.read_text(encoding="utf-8")
    self.feed(self.text)

  def handle_starttag(self, tag, attrs):
    attributes = dict(attrs)
    if "id" in attributes:
      self.anchors.add(attributes["id"])
    if tag == "a" and "href" in attributes:
      self.links.append(attributes["href"])


@pytest.fixture(scope="module")
def pages(site):
  return {path: Page(path) for path in site.rglob("*.html")}


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


def leads_somewhere(path, link, site, pages):
  """Whether a link of a page leads to a page, and to a place that is on it."""
  parts = urllib.parse.urlsplit(link)
  if parts.scheme:
    return True
  target = path.parent / urllib.parse.unquote(parts.path) if parts.path else path
  target = target.resolve()
  if not target.is_relative_to(site):
    # A file of the repository, which has no address.
    return target.is_relative_to(ROOT) and target.exists()
  if not target.is_file():
    return False
  if not parts.fragment or target.suffix != ".html":
    return True
  return urllib.parse.unquote(parts.fragment) in pages[target].anchors


def test_links_lead_somewhere(site, pages):
  links = [(path, link) for path, page in pages.items() for link in page.links]
  dead = [
    (path.name, to) for path, to in links if not leads_somewhere(path, to, site, pages)
  ]
  assert len(links) > 1000 and dead == []


@pytest.mark.parametrize(
  ("link", "expected"),
  [
    ("../pyproject.toml", f"{ADDRESS}/blob/main/pyproject.toml"),
    ("../results", f"{ADDRESS}/tree/main/results"),
    (f"{ADDRESS}/blob/main/docs/training.md", "page:../training.html"),
    ("../docs/training.md", "page:../training.html"),
  ],
)
def test_links_of_a_notebook_with_an_address(link, expected, monkeypatch):
  monkeypatch.syspath_prepend(str(DOCS / "_extensions"))
  links = importlib.import_module("repository_links")
  app = mock.Mock()
  app.config.repository_links_root = str(ROOT)
  app.config.repository_links_address = ADDRESS
  names = {"training": "training.md", "run_a_study": "tutorials/run_a_study.ipynb"}
  app.env.found_docs, app.env.doc2path = names, lambda name: str(DOCS / names[name])
  content = [f"[there]({link})"]
  links._rewrite(app, "run_a_study", content)
  assert content == [f"[there]({expected})"]


def test_pages_need_no_network(site, pages):
  outside = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//')
  assert [path.name for path in pages if outside.search(pages[path].text)] == []
  concepts = pages[site / "concepts.html"].text
  assert concepts.count("<math ") > 10 and "$" not in concepts.partition("</head>")[2]


def test_figures_have_words_and_tables_are_drawn(pages):
  for path, page in pages.items():
    images = re.findall("<img.*?>", page.text)
    words = [re.search(r'alt="([^"]*)"', image) for image in images]
    assert all(each and len(each[1].split()) > 3 for each in words), path
    # A table of Markdown that was left as it is.
    assert "| —" not in page.text and "| ---" not in page.text, path
