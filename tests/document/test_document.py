"""Documents: each format, read back by something that did not write it."""

import base64
import dataclasses
import io
import json

import bs4
import markdown_it
import matplotlib.image
import pytest
from matplotlib.figure import Figure as Drawing

from skipinit_jax import document, methods
from skipinit_jax.document import Document, Entry, Figure, Finding, Section, Table
from skipinit_jax.document.drawing import styles
from skipinit_jax.errors import UsageError

# Every sign that some format takes for its own.
HOSTILE = "<script>alert('x')</script> & 50% | $x_1$ #2 ^ ~ \\ {a} [b] *c* `d` \"e\""


def drawing(label="learning rate"):
  figure = Drawing(figsize=(4, 3), layout="constrained")
  figure.add_subplot(xlabel=label).plot([1, 2, 3], [3, 1, 2])
  return figure


ACCURACY = Table(
  "accuracy",
  "Test accuracy in %",
  ["network", "Batch norm", "SkipInit, α = 1/√d"],
  [
    ["Wide-ResNet 16-2", "93.5±0.1", Entry("93.0±0.1, 2⁻² (2⁻²..2^-1)", "good")],
    ["MLP 1000-64", "92.6", Entry("does not train", "bad")],
  ],
  note="The mean of the best 5 of 7 seeds.",
)
ESCAPED = Table("escaped", HOSTILE, [HOSTILE, "n"], [[HOSTILE, "1"]], note=HOSTILE)
FINDINGS = [
  Finding("SkipInit trains at depth 1000.", True, "92.6 %"),
  Finding("Dividing by √2 trains at depth 1000.", False, "10.8 %, which is chance"),
  Finding("Large batches need batch norm.", None, "No run had a large batch."),
]


def sample(*contents):
  curve = Figure("curve", "A curve", drawing(), HOSTILE, "A note.")
  return Document(
    title="Depth study",
    lead="Test accuracy of two networks on digits.",
    findings=FINDINGS,
    sections=[
      Section("Accuracy", "The best rate of each.", contents or [ACCURACY, curve]),
      Section("Details", "", [] if contents else [ESCAPED], collapsed=True),
    ],
    config={"num_seeds": 7, "data_dir": HOSTILE, "mlp": {"rates": (0.5, 0.25)}},
    versions={"jax": "0.10.2"},
    device="2 x cpu",
    command="python -m experiments.depth_study --workdir=runs/demo",
  )


def files_of(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp("document") / "made" / "by write"
  paths = document.write(sample(), directory)
  assert [path.parent for path in paths] == [directory] * len(paths)
  assert paths[0].name == "report.html"
  return files_of(directory)


@pytest.fixture(scope="module")
def page(written):
  return bs4.BeautifulSoup(written["report.html"], "html.parser")


def texts(table):
  rows = [[getattr(entry, "text", entry) for entry in row] for row in table.rows]
  return [list(table.header), *rows]


def test_formats(written, tmp_path):
  assert set(written) == {"report.html", "accuracy.md", "escaped.md", "curve.png"}
  document.write(sample(), tmp_path, formats=("tex", "pdf"))
  files = files_of(tmp_path)
  assert set(files) == {"report.html", "accuracy.tex", "escaped.tex", "curve.pdf"}
  assert files["curve.pdf"].startswith(b"%PDF-")
  lines = files["accuracy.tex"].decode().splitlines()
  assert r"\begin{tabular}{lrl}" in lines
  cells = next(line for line in lines if "MLP" in line).removesuffix(r"\\").split("&")
  assert [cell.strip() for cell in cells] == ["MLP 1000-64", "92.6", "does not train"]
  assert "93.0±0.1, 2\\textsuperscript{\u22122} (" in files["accuracy.tex"].decode()
  with pytest.raises(UsageError, match="Unknown format 'svg': choose one of md, pdf"):
    document.write(sample(), tmp_path / "new", formats=("md", "svg"))
  assert not (tmp_path / "new").exists()


def test_page_holds_the_tables_and_the_configuration(page):
  found = [
    [[cell.text for cell in row.find_all(["th", "td"])] for row in table.find_all("tr")]
    for table in page.find_all("table")
  ]
  assert found == [texts(ACCURACY), texts(ESCAPED)]
  classes = [cell.get("class") for cell in page.find_all("td")]
  assert classes[:4] == [["number"], ["good"], ["number"], ["bad"]]
  assert json.loads(page.find_all("pre")[-1].text) == {
    "num_seeds": 7,
    "data_dir": HOSTILE,
    "mlp": {"rates": [0.5, 0.25]},
  }


def test_page_runs_and_loads_nothing(page):
  assert not page.find_all("script")
  for element in page.find_all(True):
    assert not any(name.startswith("on") for name in element.attrs)
    for name in {"src", "href"} & element.attrs.keys():
      assert element[name].startswith("data:")
  assert "@import" not in str(page) and "url(" not in str(page)


def test_figure_is_in_the_page_and_beside_it(page, written):
  (image,) = page.find_all("img")
  assert image["alt"] == HOSTILE
  png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
  assert png == written["curve.png"]
  height, width = matplotlib.image.imread(io.BytesIO(png)).shape[:2]
  assert width / height == pytest.approx(4 / 3)


@pytest.mark.parametrize("table", [ACCURACY, ESCAPED], ids=lambda table: table.name)
def test_markdown_reads_back(table, written):
  text = written[f"{table.name}.md"].decode()
  assert document.markdown(table) in text
  parsed = markdown_it.MarkdownIt().enable("table").parse(text)
  inline = [
    "".join(child.content for child in token.children)
    for token in parsed
    if token.type == "inline"
  ]
  cells = [text for row in texts(table) for text in row]
  assert inline == [table.title, *cells, table.note]


def test_a_figure_that_fails_leaves_the_earlier_document(tmp_path):
  document.write(sample(ACCURACY), tmp_path)
  before = files_of(tmp_path)
  # Matplotlib refuses the formula only while it draws.
  broken = Figure("figure", "", drawing(r"$\frac{$"), "")
  with pytest.raises(ValueError, match="frac"):
    document.write(sample(dataclasses.replace(ACCURACY, title="2"), broken), tmp_path)
  assert files_of(tmp_path) == before


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["../up"], "cannot name a file"),
    ([""], "cannot name a file"),
    (["two words"], "cannot name a file"),
    (["accuracy", "Accuracy"], "Two tables or figures"),
  ],
)
def test_names_that_cannot_be_files_are_refused(names, message, tmp_path):
  tables = [dataclasses.replace(ACCURACY, name=name) for name in names]
  with pytest.raises(ValueError, match=message):
    document.write(sample(*tables), tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_terminal_shows_every_digit_and_no_markup(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "60")
  header = ["[red]network", *(f"method {number}" for number in range(12))]
  rows = [[f"[/MLP] {row}", *["93.5±0.1, (2⁻²..2^-1)"] * 12] for row in range(3)]
  document.print_table(Table("t", "[bold]title", header, rows, note="[dim]note"))
  printed = capsys.readouterr().out
  assert printed.count("(2⁻²..2^-1)") == 36
  assert "…" not in printed
  for text in ("[bold]title", "[red]network", "[/MLP] 2", "[dim]note"):
    assert text in printed


def test_a_method_looks_the_same_in_every_figure():
  titles = {methods.get(name).title for name in methods.NAMES}
  everything = styles([*sorted(titles), "theory"])
  looks = [(style["color"], style["marker"]) for style in everything.values()]
  assert len(set(looks[:-1])) == len(titles)
  few = styles(["theory", "SkipInit, α = 0", "nothing", "Batch norm"])
  for title in ("SkipInit, α = 0", "Batch norm"):
    assert few[title] == everything[title]
  assert len({style["color"] for style in few.values()}) == 4
  # A variant has its method's color, and a paler one beside the method itself.
  alone = styles(["Batch norm, no L2", "theory"])["Batch norm, no L2"]
  beside = styles(["Batch norm", "Batch norm, no L2"])
  assert alone["color"] == beside["Batch norm"]["color"] == few["Batch norm"]["color"]
  assert beside["Batch norm, no L2"]["color"] != few["Batch norm"]["color"]
