"""Documents: what each format says, read back by something that did not write it."""

# LaTeX has to be told of just those signs that ruff takes for others.
# ruff: noqa: RUF001

import csv
import dataclasses
import html.parser
import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import matplotlib.image
import pytest
from matplotlib.figure import Figure as Drawing

from skipinit_jax import document
from skipinit_jax.document import (
  Document,
  Entry,
  Figure,
  Finding,
  Section,
  Table,
)

# Every sign that some format takes for its own.
HOSTILE = "<script>alert('x')</script> & 50% | $x_1$ #2 ^ ~ \\ {a} [b] *c* `d` \"e\""


def drawing(label="learning rate"):
  figure = Drawing(figsize=(4, 3), layout="constrained")
  axes = figure.add_subplot()
  axes.plot([1, 2, 3], [3, 1, 2], marker="o", label=label)
  axes.set_xlabel(label)
  axes.legend()
  return figure


ACCURACY = Table(
  "accuracy",
  "Test accuracy in %",
  ["network", "Batch norm", "SkipInit, α = 1/√d"],
  [
    ["Wide-ResNet 16-2", "93.5±0.1", Entry("93.0±0.1, 2^-2 (2^-2..2^-1)", "good")],
    ["MLP 1000-64", "92.6", Entry("does not train", "bad")],
  ],
  note="The mean of the best 5 of 7 seeds.",
)
ESCAPED = Table("escaped", HOSTILE, [HOSTILE, "n"], [[HOSTILE, "1"]], note=HOSTILE)
# Wider than a phone, and than the page.
WIDE = Table(
  "wide",
  "Many methods",
  ["network", *(f"method {number}" for number in range(12))],
  [[f"MLP {row}", *["93.5±0.1, 2^-2 (2^-2..2^-1)"] * 12] for row in range(3)],
)
FINDINGS = [
  Finding("SkipInit trains at depth 1000.", True, "92.6 %"),
  Finding("Dividing by √2 trains at depth 1000.", False, "10.8 %, which is chance"),
  Finding("Large batches need batch norm.", None, "No run had a large batch."),
]


def sample():
  curve = Figure("curve", "A curve", drawing(), "Accuracy peaks at 2^-2.", "A note.")
  other = Figure("other", "Another", drawing("<b>&amp;--></b>"), HOSTILE)
  return Document(
    title="Depth study",
    lead="Test accuracy of two networks on digits.",
    findings=FINDINGS,
    sections=[
      Section("Accuracy", "The best learning rate of each.", [ACCURACY, curve]),
      Section("Details", "", [ESCAPED, other, WIDE], collapsed=True),
    ],
    config={
      "num_seeds": 7,
      "data_dir": HOSTILE,
      "rates": (0.5, 0.25),
      "none": (),
      "wide_resnet": {"schedule": {"kind": "step"}, "stages": [{"width": 2}, {}]},
    },
    versions={"jax": "0.10.2"},
    device="2 x cpu",
    command="python -m experiments.depth_study --workdir=runs/demo",
  )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp("document") / "made" / "by write"
  paths = document.write(sample(), directory)
  assert {path.parent for path in paths} == {directory}
  return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def page(written):
  return Page(written["report.html"].decode())


class Page(html.parser.HTMLParser):
  """The elements of a page, and each table as rows of (tag, scope, class, text)."""

  def __init__(self, text):
    super().__init__()
    self.elements = []
    self.tables = []
    self.text = ""
    self._cell = None
    self.feed(text)

  def handle_starttag(self, tag, attributes):
    attributes = dict(attributes)
    self.elements.append((tag, attributes))
    if tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("th", "td"):
      self._cell = [tag, attributes.get("scope"), attributes.get("class"), ""]
      self.tables[-1][-1].append(self._cell)

  def handle_endtag(self, tag):
    if tag in ("th", "td"):
      self._cell = None

  def handle_data(self, data):
    self.text += data
    if self._cell is not None:
      self._cell[-1] += data

  def all(self, tag):
    return [attributes for name, attributes in self.elements if name == tag]


def texts(table):
  return [
    [entry.text if isinstance(entry, Entry) else entry for entry in row]
    for row in [table.header, *table.rows]
  ]


def test_write_makes_the_page_and_three_files_of_each_table_and_figure(written):
  tables = itertools.product(("accuracy", "escaped", "wide"), ("csv", "md", "tex"))
  figures = itertools.product(("curve", "other"), ("pdf", "png", "svg"))
  files = {f"{name}.{kind}" for name, kind in (*tables, *figures)}
  assert set(written) == {"report.html"} | files


def test_page_holds_the_tables(page):
  *tables, config = page.tables
  for table, found in zip([ACCURACY, ESCAPED, WIDE], tables, strict=True):
    assert [[cell[-1] for cell in row] for row in found] == texts(table)
    assert {(cell[0], cell[1]) for cell in found[0]} == {("th", "col")}
    assert {(row[0][0], row[0][1]) for row in found[1:]} == {("th", "row")}
  (_, _, numeric, _), (_, _, mark, _) = tables[0][1][1:]
  assert (numeric, mark) == ("number", "good")
  assert [[cell[-1] for cell in row] for row in config] == [
    ["setting", "value"],
    ["num_seeds", "7"],
    ["data_dir", HOSTILE],
    ["rates", "0.5, 0.25"],
    ["none", "(none)"],
    ["wide_resnet.schedule.kind", "step"],
    ["wide_resnet.stages.0.width", "2"],
  ]


def test_page_says_first_what_holds(page):
  words = " ".join(page.text.split())
  places = [
    words.index(text)
    for text in (
      "Test accuracy of two networks on digits.",
      "✓ Holds SkipInit trains at depth 1000. 92.6 %",
      "✗ Does not hold Dividing by √2 trains at depth 1000. 10.8 %",
      "? Cannot tell Large batches need batch norm. No run had",
      "The best learning rate of each.",
    )
  ]
  assert places == sorted(places)
  assert "python -m experiments.depth_study --workdir=runs/demo" in words
  assert "jax 0.10.2" in words


def test_page_runs_and_loads_nothing(page, written):
  assert not page.all("script")
  text = written["report.html"].decode()
  for _, attributes in page.elements:
    for name, value in attributes.items():
      assert not name.startswith("on")
      if name in ("src", "href", "xlink:href", "action", "data", "poster"):
        assert value.startswith(("#", "data:")), value
  assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))
  assert "@import" not in text


def test_page_is_accessible(page):
  assert page.all("html") == [{"lang": "en"}]
  headings = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
  assert headings[0] == 1 and headings.count(1) == 1
  assert all(below <= above + 1 for above, below in itertools.pairwise(headings))
  labels = [div["aria-label"] for div in page.all("div") if div.get("role") == "img"]
  assert labels == ["Accuracy peaks at 2^-2.", HOSTILE]


def test_figures_in_the_page_keep_to_their_own_ids(page):
  ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
  assert len(ids) == len(set(ids))
  used = [use["xlink:href"].removeprefix("#") for use in page.all("use")]
  clips = [
    attributes["clip-path"].removeprefix("url(#").removesuffix(")")
    for _, attributes in page.elements
    if "clip-path" in attributes
  ]
  assert used and clips
  assert set(used + clips) <= set(ids)


def test_images_are_images(written, tmp_path):
  for name in ("curve", "other"):
    root = ET.fromstring(written[f"{name}.svg"])
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("width") == "288pt"
    # Letters are shapes: no font is asked for.
    assert not root.findall(".//{http://www.w3.org/2000/svg}text")
    assert written[f"{name}.pdf"].startswith(b"%PDF-")
    path = tmp_path / f"{name}.png"
    path.write_bytes(written[f"{name}.png"])
    assert matplotlib.image.imread(path).shape[:2] == (450, 600)


@pytest.mark.parametrize("table", [ACCURACY, ESCAPED, WIDE], ids=lambda t: t.name)
def test_csv_reads_back(table, written):
  text = written[f"{table.name}.csv"].decode()
  assert list(csv.reader(text.splitlines())) == texts(table)


def test_markdown_is_a_table():
  assert document.markdown(ACCURACY) == (
    "| network | Batch norm | SkipInit, α = 1/√d |\n"
    "| --- | ---: | --- |\n"
    "| Wide-ResNet 16-2 | 93.5±0.1 | 93.0±0.1, 2^-2 (2^-2..2^-1) |\n"
    "| MLP 1000-64 | 92.6 | does not train |\n"
  )


def test_markdown_file_has_title_and_note(written):
  text = written["accuracy.md"].decode()
  title, table, note = text.split("\n\n")
  assert (title, note) == ("### Test accuracy in %", f"{ACCURACY.note}\n")
  assert f"{table}\n" == document.markdown(ACCURACY)


def test_markdown_escapes_what_would_be_markup():
  lines = document.markdown(ESCAPED).splitlines()
  assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {3}
  # What is left unescaped is no markup.
  bare = re.sub(r"\\[\\`*\[\]<|~$&_]", "", lines[2])
  assert not re.search(r"[\\`*\[\]<~$]", bare)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("batch_norm", "batch_norm"),
    ("_x_", r"\_x\_"),
    ("__x__", r"\_\_x\_\_"),
    ("&lt; a & b", r"\&lt; a & b"),
    ("two\nlines", "two lines"),
  ],
)
def test_markdown_escapes_no_more_than_it_must(text, expected):
  table = Table("t", "", [text], [])
  assert document.markdown(table).splitlines()[0] == f"| {expected} |"


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("50 % & a_b #1 $2", r"50 \% \& a\_b \#1 \$2"),
    (r"{x} \y", r"\{x\} \textbackslash{}y"),
    ("~z ^w", r"\textasciitilde{}z \textasciicircum{}w"),
    ("a < b > c | d", "a $<$ b $>$ c $|$ d"),
    ("93.5±0.1, 2^-5", r"93.5$\pm$0.1, $2^{-5}$"),
    ("(2^-3..2^0)", "($2^{-3}$..$2^{0}$)"),
    ("α = 1/√d, √2", r"$\alpha$ = 1/$\sqrt{d}$, $\sqrt{2}$"),
    ("-0.3, Wide-ResNet 16-4", "$-$0.3, Wide-ResNet 16-4"),
    ("−0.3", "$-$0.3"),
    ("--seed 2–3", "-{}-seed 2--3"),
    # Both would be arguments of the row before.
    ("[1] *", "{[}1] {*}"),
    ("Müller’s", "Müller's"),
    ("日", r"\texttt{U+65E5}"),
  ],
)
def test_latex_escapes(text, expected, tmp_path):
  table = Table("t", "Title", ["", text], [])
  section = Section("", "", [table])
  empty = Document("", "", [], [section], {}, {}, "", "")
  document.write(empty, tmp_path)
  assert rf" & {expected} \\" in (tmp_path / "t.tex").read_text()


def test_latex_is_a_booktabs_table(written):
  assert written["accuracy.tex"].decode().splitlines() == [
    r"% Needs \usepackage{booktabs} in the preamble.",
    r"\begin{table}",
    r"  \centering",
    r"  \caption{Test accuracy in \%. The mean of the best 5 of 7 seeds.}",
    r"  \label{tab:accuracy}",
    r"  \begin{tabular}{lrl}",
    r"    \toprule",
    r"    network & Batch norm & SkipInit, $\alpha$ = 1/$\sqrt{d}$ \\",
    r"    \midrule",
    r"    Wide-ResNet 16-2 & 93.5$\pm$0.1 & 93.0$\pm$0.1, $2^{-2}$ "
    r"($2^{-2}$..$2^{-1}$) \\",
    r"    MLP 1000-64 & 92.6 & does not train \\",
    r"    \bottomrule",
    r"  \end{tabular}",
    r"\end{table}",
  ]


def test_same_document_gives_the_same_bytes(written, tmp_path):
  document.write(sample(), tmp_path)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written


def test_a_figure_that_fails_leaves_the_earlier_document(tmp_path):
  first = Document(
    "First", "", [], [Section("", "", [ACCURACY])], {}, {}, "cpu", "make"
  )
  document.write(first, tmp_path)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  # Matplotlib refuses the formula only while it draws.
  contents = [
    dataclasses.replace(ACCURACY, title="Second"),
    Figure("figure", "", drawing(r"$\frac{$"), ""),
  ]
  second = dataclasses.replace(first, sections=[Section("", "", contents)])
  with pytest.raises(ValueError, match="frac"):
    document.write(second, tmp_path)
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["../up", "", "two words", ".hidden"])
def test_names_that_cannot_be_files_are_refused(name, tmp_path):
  sections = [Section("", "", [dataclasses.replace(ACCURACY, name=name)])]
  with pytest.raises(ValueError, match="cannot name a file"):
    document.write(Document("", "", [], sections, {}, {}, "", ""), tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_two_of_one_name_are_refused(tmp_path):
  contents = [ACCURACY, Figure("Accuracy", "", drawing(), "")]
  sections = [Section("", "", contents)]
  with pytest.raises(ValueError, match="Two tables or figures"):
    document.write(Document("", "", [], sections, {}, {}, "", ""), tmp_path)


def test_rows_as_long_as_the_header():
  with pytest.raises(ValueError, match=r"Row 2 of table 'short' has 1 entries"):
    Table("short", "", ["a", "b"], [["1", "2"], ["1"]])


def test_terminal_shows_every_digit(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "60")
  document.print_table(WIDE)
  printed = capsys.readouterr().out
  assert "Many methods" in printed
  assert printed.count("(2^-2..2^-1)") == 36
  assert "…" not in printed


def test_terminal_takes_no_entry_for_markup(capsys):
  document.print_table(
    Table("t", "[bold]title", ["[red]a"], [["[/nothing]"]], note="[dim]note")
  )
  printed = capsys.readouterr().out
  for text in ("[bold]title", "[red]a", "[/nothing]", "[dim]note"):
    assert text in printed


# Opens the page as a phone and as a desktop do, and says what a script finds there.
# The smallest window of a headless browser is wider than a phone, hence the frames.
_HOST = """<!doctype html>
<iframe src="report.html" style="width: 390px; height: 800px; border: 0"></iframe>
<iframe src="report.html" style="width: 1280px; height: 800px; border: 0"></iframe>
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument;
    page.querySelectorAll("details").forEach(details => { details.open = true; });
    const scroll = [...page.querySelectorAll(".scroll")];
    return {
      width: page.documentElement.clientWidth,
      needed: page.documentElement.scrollWidth,
      tables: [...page.querySelectorAll("table")].map(table => table.rows.length),
      scrolling: scroll.filter(box => box.scrollWidth > box.clientWidth).length,
      figures: [...page.querySelectorAll("svg")].map(svg => svg.clientWidth),
    };
  });
  console.info("measured");
  document.body.textContent = JSON.stringify(found);
});
</script>
"""


def test_browser_shows_the_page(written, tmp_path):
  browsers = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
  browser = next(filter(None, browsers), None)
  if browser is None:
    pytest.skip("no Chromium is installed to open the page with")
  (tmp_path / "report.html").write_bytes(written["report.html"])
  host = tmp_path / "host.html"
  host.write_text(_HOST)
  result = subprocess.run(
    [
      browser,
      "--headless=new",
      "--no-sandbox",
      "--disable-gpu",
      "--disable-dev-shm-usage",
      "--hide-scrollbars",
      "--allow-file-access-from-files",
      f"--user-data-dir={tmp_path / 'profile'}",
      "--enable-logging=stderr",
      "--window-size=1400,1700",
      "--virtual-time-budget=3000",
      "--dump-dom",
      host.as_uri(),
    ],
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
  )
  messages = re.findall(r".*CONSOLE.*", result.stderr)
  # The script's own message shows that messages arrive here; the page has none.
  assert len(messages) == 1 and "measured" in messages[0], result.stderr
  body = re.search(r"<body>(.*)</body>", result.stdout, re.DOTALL)
  assert body, result.stdout
  phone, desktop = json.loads(body[1])
  assert (phone["width"], desktop["width"]) == (390, 1280)
  for view in (phone, desktop):
    assert view["needed"] == view["width"], "the page scrolls sideways"
    assert view["tables"] == [3, 2, 4, 7]
    # The wide table scrolls in its own box, so the line above was put to the test.
    assert view["scrolling"] >= 1
  assert all(0 < width < 390 for width in phone["figures"])
