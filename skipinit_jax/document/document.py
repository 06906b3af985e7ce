"""Documents: a study's findings, tables and figures in every format people read.

A study fills in a `Document`; `write` turns it into one HTML page that needs nothing
else, and into a file for each table and figure that a paper or a README can take.
"""

# LaTeX has to be told of just those signs that ruff takes for others.
# ruff: noqa: RUF001

import csv
import dataclasses
import io
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import rich.box
import rich.console
import rich.table
import rich.text

from skipinit_jax.files import Path, workdir_path, write_file

# A program imports this module before it runs the study, and needs matplotlib after.
if TYPE_CHECKING:
  import matplotlib.figure

# Names become names of files, anchors in the page and labels in LaTeX.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

_NUMBER = re.compile(
  r"[-+−]?(\d[\d,]*(\.\d*)?|\.\d+)(e[-+]?\d+)?(\^[-−]?\d+)?( ?± ?[\d.]+)?( ?%)?",
  re.IGNORECASE,
)
_NO_NUMBER = {"", "-", "–", "—", "nan", "inf", "-inf"}

_STYLES = {"good": "green", "bad": "red", "muted": "dim", None: ""}


@dataclasses.dataclass(frozen=True)
class Finding:
  """One claim, checked on a study's results.

  Attributes:
    claim: a sentence that is true or false.
    holds: whether the results agree; None where they cannot tell.
    evidence: the numbers that decided, or what is missing.
  """

  claim: str
  holds: bool | None
  evidence: str


@dataclasses.dataclass(frozen=True)
class Entry:
  """An entry of a table that stands out.

  Attributes:
    text: what it says, complete without the mark: most formats have no color.
    mark: how the page and the terminal color it.
  """

  text: str
  mark: Literal["good", "bad", "muted"] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """A table; the first entry of each row names the row.

  Attributes:
    name: the stem of its files: letters, digits, "_" and "-".
    title: what it shows.
    header: a name for each column.
    rows: entries in the order of the header.
    note: a paragraph on how to read it and where it is from.

  Raises:
    ValueError: a row and the header differ in length.
  """

  name: str
  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[str | Entry]]
  note: str = ""

  def __post_init__(self) -> None:
    for number, row in enumerate(self.rows, start=1):
      if len(row) != len(self.header):
        raise ValueError(
          f"Row {number} of table {self.name!r} has {len(row)} entries, but its "
          f"header has {len(self.header)}."
        )


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure.

  Attributes:
    name: the stem of its files: letters, digits, "_" and "-".
    title: what it shows.
    figure: a figure made without pyplot, drawn for a white background.
    description: what someone who cannot see it should know.
    note: a paragraph on how to read it.
  """

  name: str
  title: str
  figure: "matplotlib.figure.Figure"
  description: str
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of a document.

  Attributes:
    title: its heading.
    text: a paragraph that introduces it; may be empty.
    contents: its tables and figures, in order.
    collapsed: whether the page shows only the heading until a reader opens it.
  """

  title: str
  text: str
  contents: Sequence[Table | Figure]
  collapsed: bool = False


@dataclasses.dataclass(frozen=True)
class Document:
  """What a study found, and everything that is needed to find it again.

  Attributes:
    title: the study's name.
    lead: one or two sentences: what was measured, on what, with what.
    findings: the claims that the study checks.
    sections: tables and figures.
    config: the study's configuration, nested.
    versions: of the packages that decide the results.
    device: kind and number of the devices.
    command: the command that makes the document again.
  """

  title: str
  lead: str
  findings: Sequence[Finding]
  sections: Sequence[Section]
  config: Mapping[str, Any]
  versions: Mapping[str, str]
  device: str
  command: str


def command_line(shown: Mapping[str, str] = MappingProxyType({})) -> str:
  """Returns how this program was called, without the interpreter's path.

  Args:
    shown: by what must not be shown, what stands in its place.
  """
  module = getattr(sys.modules["__main__"], "__spec__", None)
  arguments = ["-m", module.name, *sys.argv[1:]] if module else sys.argv
  for hidden, text in shown.items():
    arguments = [argument.replace(hidden, text) for argument in arguments]
  return shlex.join(["python", *arguments])


def write(document: Document, directory: str | os.PathLike[str]) -> list[Path]:
  """Writes `report.html` and the files of each table and figure.

  A table is written as NAME.md, NAME.csv and NAME.tex, a figure as NAME.png, NAME.svg
  and NAME.pdf. The same document gives the same bytes. Everything is rendered before
  the first file is touched, so that a document that fails leaves an earlier one whole.

  Args:
    document: what to write.
    directory: where to, or a folder of a bucket; made if it does not exist.

  Returns:
    The files, `report.html` first.

  Raises:
    ValueError: two tables or figures share a name, or a name cannot be a file's.
  """
  files: dict[str, bytes] = {}
  drawings: dict[str, str] = {}
  names = set()
  for item in (item for section in document.sections for item in section.contents):
    if not _NAME.fullmatch(item.name):
      raise ValueError(
        f"{item.name!r} cannot name a file: use letters, digits, '_' and '-'."
      )
    # Some file systems do not tell the cases apart.
    if item.name.lower() in names:
      raise ValueError(f"Two tables or figures are named {item.name!r}.")
    names.add(item.name.lower())
    if isinstance(item, Table):
      texts = {"md": _markdown_file(item), "csv": _csv(item), "tex": _latex(item)}
      files |= {f"{item.name}.{kind}": text.encode() for kind, text in texts.items()}
    else:
      images = _draw(item)
      files |= {f"{item.name}.{kind}": image for kind, image in images.items()}
      drawings[item.name] = _inline(item.name, images["svg"].decode())
  files = {"report.html": _html(document, drawings).encode()} | files

  folder = workdir_path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in files.items():
    write_file(folder / name, content)
  return [folder / name for name in files]


def markdown(table: Table) -> str:
  """Returns the table in Markdown, without its title and note."""
  rule = ["---:" if numeric else "---" for numeric in _numeric_columns(table)]
  rows = [[_escape_markdown(entry.text) for entry in row] for row in _entries(table)]
  lines = [[_escape_markdown(name) for name in table.header], rule, *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_table(table: Table) -> None:
  """Prints the table to standard output."""
  # Text, where a string would be read as markup: "[bold]" is a legal entry.
  view = rich.table.Table(
    title=rich.text.Text(table.title),
    caption=rich.text.Text(table.note),
    box=rich.box.SIMPLE_HEAVY,
  )
  rows = _entries(table)
  for index, numeric in enumerate(_numeric_columns(table)):
    texts = [table.header[index], *(row[index].text for row in rows)]
    view.add_column(
      rich.text.Text(table.header[index]),
      no_wrap=index == 0,
      # With crop=False below: a narrow terminal gets long lines, never half a number.
      min_width=max(len(word) for text in texts for word in text.split() or [""]),
      justify="right" if numeric else "left",
    )
  for row in rows:
    view.add_row(*(rich.text.Text(entry.text, _STYLES[entry.mark]) for entry in row))
  rich.console.Console().print(view, crop=False)


def print_findings(findings: Sequence[Finding]) -> None:
  """Prints the claims, each behind its verdict, to standard output."""
  marks = {True: "holds", False: "does not hold", None: "cannot tell"}
  for finding in findings:
    print(f"[{marks[finding.holds]}] {finding.claim}")


def _entries(table: Table) -> list[list[Entry]]:
  return [
    [entry if isinstance(entry, Entry) else Entry(entry) for entry in row]
    for row in table.rows
  ]


def _numeric_columns(table: Table) -> list[bool]:
  """Tells for each column whether it holds numbers, which align on the right."""
  columns = [[row[i].text for row in _entries(table)] for i in range(len(table.header))]
  return [
    any(map(_NUMBER.fullmatch, column))
    and all(
      _NUMBER.fullmatch(text) or text.strip().lower() in _NO_NUMBER for text in column
    )
    for column in columns
  ]


def _markdown_file(table: Table) -> str:
  parts = [f"### {_escape_markdown(table.title)}\n", markdown(table)]
  if table.note:
    parts.append(f"{_escape_markdown(table.note)}\n")
  return "\n".join(parts)


def _escape_markdown(text: str) -> str:
  # An underscore inside a word means nothing in GitHub's Markdown, and names such as
  # batch_norm stay readable in the source.
  signs = r"[\\`*\[\]<|~$]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])"
  return " ".join(re.sub(signs, r"\\\g<0>", text).split())


def _csv(table: Table) -> str:
  file = io.StringIO()
  writer = csv.writer(file, lineterminator="\n")
  writer.writerow(table.header)
  writer.writerows([entry.text for entry in row] for row in _entries(table))
  return file.getvalue()


# What pdfLaTeX with its default encodings would refuse, drop or print as another sign.
_LATEX = {
  "\\": r"\textbackslash{}",
  "{": r"\{",
  "}": r"\}",
  "%": r"\%",
  "&": r"\&",
  "_": r"\_",
  "#": r"\#",
  "$": r"\$",
  "^": r"\textasciicircum{}",
  "~": r"\textasciitilde{}",
  "<": "$<$",
  ">": "$>$",
  "|": "$|$",
  '"': "''",
  # At the start of a row, LaTeX would take both for arguments of the row before.
  "[": "{[}",
  "*": "{*}",
  "\u00a0": "~",
  "−": "$-$",
  "–": "--",
  "—": "---",
  "…": r"\ldots{}",
  "‘": "`",
  "’": "'",
  "“": "``",
  "”": "''",
  "±": r"$\pm$",
  "×": r"$\times$",
  "·": r"$\cdot$",
  "√": r"$\surd$",
  "∞": r"$\infty$",
  "≈": r"$\approx$",
  "≠": r"$\neq$",
  "≤": r"$\leq$",
  "≥": r"$\geq$",
  "∝": r"$\propto$",
  "→": r"$\rightarrow$",
  "←": r"$\leftarrow$",
  "²": "$^2$",
  "³": "$^3$",
  "°": r"$^\circ$",
  "ℓ": r"$\ell$",
  "α": r"$\alpha$",
  "β": r"$\beta$",
  "γ": r"$\gamma$",
  "δ": r"$\delta$",
  "ε": r"$\varepsilon$",
  "η": r"$\eta$",
  "θ": r"$\theta$",
  "λ": r"$\lambda$",
  "μ": r"$\mu$",
  "µ": r"$\mu$",
  "π": r"$\pi$",
  "ρ": r"$\rho$",
  "σ": r"$\sigma$",
  "τ": r"$\tau$",
  "φ": r"$\varphi$",
  "Δ": r"$\Delta$",
  "Σ": r"$\Sigma$",
}
_LATEX_TOKEN = re.compile(
  r"(?P<base>\d[\d.]*)\^(?P<exponent>[-−]?\d+)"
  r"|√(?P<radicand>\d+|[A-Za-z])"
  r"|(?P<minus>(?<![\w)\-])-(?=\.?\d))"
  # Two hyphens, as in --workdir, would print as one dash.
  r"|(?P<hyphen>-(?=-))"
  r"|(?P<sign>[^\w\s]|[^\x00-\x7f]|_)"
)


def _escape_latex(text: str) -> str:
  def escape(match: re.Match[str]) -> str:
    found = match.groupdict()
    if found["base"]:
      return f"${found['base']}^{{{found['exponent'].replace('−', '-')}}}$"
    if found["radicand"]:
      return rf"$\sqrt{{{found['radicand']}}}$"
    if found["minus"]:
      return "$-$"
    if found["hyphen"]:
      return "-{}"
    sign = found["sign"]
    # What pdfLaTeX's default fonts have; at any other sign it would stop.
    known = sign.isascii() or ("À" <= sign <= "ÿ" and sign not in "ÐÞðþ÷")
    return _LATEX.get(sign, sign if known else rf"\texttt{{U+{ord(sign):04X}}}")

  return " ".join(_LATEX_TOKEN.sub(escape, text).split())


def _latex(table: Table) -> str:
  columns = "".join("r" if numeric else "l" for numeric in _numeric_columns(table))
  rows = [[_escape_latex(entry.text) for entry in row] for row in _entries(table)]
  header, *body = (
    f"    {' & '.join(row)} \\\\\n"
    for row in [[_escape_latex(name) for name in table.header], *rows]
  )
  caption = " ".join(
    _escape_latex(text.rstrip(".")) + "." for text in (table.title, table.note) if text
  )
  return (
    "% Needs \\usepackage{booktabs} in the preamble.\n"
    "\\begin{table}\n"
    "  \\centering\n"
    f"  \\caption{{{caption}}}\n"
    f"  \\label{{tab:{table.name}}}\n"
    f"  \\begin{{tabular}}{{{columns}}}\n"
    f"    \\toprule\n{header}    \\midrule\n{''.join(body)}    \\bottomrule\n"
    "  \\end{tabular}\n"
    "\\end{table}\n"
  )


def _draw(figure: Figure) -> dict[str, bytes]:
  import matplotlib

  images = {}
  # Without dates, versions and random ids, a figure drawn again is the same file.
  metadata: dict[str, dict[str, None]] = {
    "png": dict.fromkeys(["Software"]),
    "svg": dict.fromkeys(["Creator", "Date", "Format", "Type"]),
    "pdf": dict.fromkeys(["Creator", "Producer", "CreationDate"]),
  }
  with matplotlib.rc_context(
    {
      "svg.hashsalt": figure.name,
      # Letters as shapes look the same with whatever fonts a phone has.
      "svg.fonttype": "path",
      # Publishers refuse matplotlib's default, Type 3 fonts.
      "pdf.fonttype": 42,
    }
  ):
    for kind, without in metadata.items():
      file = io.BytesIO()
      figure.figure.savefig(file, format=kind, dpi=150, metadata=without)
      images[kind] = file.getvalue()
      # What the first format has laid out, the others need not: it takes seconds.
      figure.figure.set_layout_engine("none")
  return images


def _inline(name: str, svg: str) -> str:
  """Returns the SVG as an element whose ids no other figure of the page has."""
  return re.sub(
    r'(\bid="|\bhref="#|\burl\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :]
  )


def _html(document: Document, drawings: Mapping[str, str]) -> str:
  import jinja2

  environment = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
  )
  template = pathlib.Path(__file__).with_name("document.html")
  return environment.from_string(template.read_text(encoding="utf-8")).render(
    document=document,
    drawings=drawings,
    entries=_entries,
    numeric_columns=_numeric_columns,
    settings=list(_flatten(document.config)),
  )


def _flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
  """Yields a dotted name and a text for each plain value in nested ones."""
  if isinstance(value, Mapping):
    items = [(str(key), item) for key, item in value.items()]
  elif isinstance(value, list | tuple) and any(
    isinstance(item, Mapping | list | tuple) for item in value
  ):
    items = [(str(index), item) for index, item in enumerate(value)]
  elif isinstance(value, list | tuple):
    yield name, ", ".join(map(str, value)) or "(none)"
    return
  else:
    yield name, str(value)
    return
  for key, item in items:
    yield from _flatten(item, f"{name}.{key}" if name else key)
