"""What a document is made of: findings, tables and figures."""

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

# A program imports this module before it runs the study, and needs matplotlib after.
if TYPE_CHECKING:
  import matplotlib.figure


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
    shown: by a flag, such as "--storage", what stands in place of its value, however
      often and in whatever way it is given; by another text, what stands in its place.
  """
  module = getattr(sys.modules["__main__"], "__spec__", None)
  arguments = ["-m", module.name, *sys.argv[1:]] if module else [*sys.argv]
  for hidden, text in shown.items():
    if not hidden.startswith("--"):
      arguments = [each.replace(hidden, text) if hidden else each for each in arguments]
      continue
    for index, argument in enumerate(arguments):
      name, equals, _ = argument.partition("=")
      if name in (hidden, hidden[1:]):
        if equals:
          arguments[index] = f"{name}={text}"
        elif index + 1 < len(arguments):
          arguments[index + 1] = text
  # A name of a file that is not UTF-8 can be in an argument, but in no page.
  line = shlex.join(["python", *arguments])
  return line.encode(errors="backslashreplace").decode()
