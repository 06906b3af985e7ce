"""Tables and findings as text: Markdown, LaTeX and the terminal."""

import re
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from skipinit_jax.document.document import Entry, Finding, Table
from skipinit_jax.errors import extra

_VERDICTS = {True: "holds", False: "does not hold", None: "cannot tell"}
# Such as -1,000, 2⁻⁵, 1.5e-3, 93.5±0.1 and 12 %.
_NUMBER = re.compile(
  r"[-+]?\.?\d[\d.,]*(e[-+]?\d+|[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?( ?± ?[\d.]+)?( ?%)?"
)
_NO_NUMBER = {"", "-", "nan", "inf", "-inf"}

_STYLES = {"good": "green", "bad": "red", "muted": "dim", None: ""}


def markdown(table: Table) -> str:
  """Returns the table in Markdown, without its title and note."""
  rule = ["---:" if numeric else "---" for numeric in numeric_columns(table)]
  rows = [[_escape(entry.text) for entry in row] for row in entries(table)]
  lines = [[_escape(name) for name in table.header], rule, *rows]
  return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_file(table: Table) -> str:
  """Returns the table in Markdown, between its title and its note."""
  parts = [f"### {_escape(table.title)}\n", markdown(table)]
  if table.note:
    parts.append(f"{_escape(table.note)}\n")
  return "\n".join(parts)


def latex(table: Table) -> str:
  """Returns the table as LaTeX's `tabular`, to stand in a `table` of a paper."""
  with extra("figures"):
    import tabulate

  text = tabulate.tabulate(
    [[entry.text for entry in row] for row in entries(table)],
    table.header,
    tablefmt="latex_booktabs",
    disable_numparse=True,
    colalign=["right" if numeric else "left" for numeric in numeric_columns(table)],
  )
  # LaTeX's own fonts lack some of these signs.
  text = re.sub(
    "[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+",
    lambda raised: f"\\textsuperscript{{{unicodedata.normalize('NFKC', raised[0])}}}",
    text,
  )
  needs = "% Needs the package booktabs, and for signs such as α LuaLaTeX or XeLaTeX."
  return f"{needs}\n{text}\n"


def print_table(table: Table, file: TextIO | None = None) -> None:
  """Prints the table.

  Args:
    table: with its title above and its note below.
    file: where to; None is standard output.
  """
  with extra("figures"):
    import rich.box
    import rich.console
    import rich.table
    import rich.text
  # Text, where a string would be read as markup: "[bold]" is a legal entry.
  view = rich.table.Table(
    title=rich.text.Text(table.title),
    caption=rich.text.Text(table.note),
    box=rich.box.SIMPLE_HEAVY,
  )
  rows = entries(table)
  for index, numeric in enumerate(numeric_columns(table)):
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
  rich.console.Console(file=file).print(view, crop=False)


def findings_table(findings: Sequence[Finding]) -> Table:
  """Returns the claims, whether they hold, and the evidence."""
  rows = [[each.claim, _VERDICTS[each.holds], each.evidence] for each in findings]
  return Table("claims", "What holds here", ["claim", "here", "evidence"], rows)


def print_findings(findings: Sequence[Finding]) -> None:
  """Prints the claims, each behind its verdict, to standard output."""
  for finding in findings:
    print(f"[{_VERDICTS[finding.holds]}] {finding.claim}")


def entries(table: Table) -> list[list[Entry]]:
  """Returns the table's rows, each plain string as an unmarked entry."""
  return [
    [entry if isinstance(entry, Entry) else Entry(entry) for entry in row]
    for row in table.rows
  ]


def numeric_columns(table: Table) -> list[bool]:
  """Tells for each column whether it holds numbers, which align on the right."""
  columns = [[row[i].text for row in entries(table)] for i in range(len(table.header))]
  return [
    any(map(_NUMBER.fullmatch, column))
    and all(_NUMBER.fullmatch(text) or text in _NO_NUMBER for text in column)
    for column in columns
  ]


def _escape(text: str) -> str:
  """Returns the text with backslashes before what Markdown takes for markup."""
  # An underscore inside a word means nothing in GitHub's Markdown, and names such as
  # batch_norm stay readable in the source.
  signs = r"[\\`*\[\]<|~$]|&(?=#?\w+;)|(?<![^\W_])_|_(?![^\W_])"
  return " ".join(re.sub(signs, r"\\\g<0>", text).split())
