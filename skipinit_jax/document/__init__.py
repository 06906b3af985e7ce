"""Documents: tables, figures and findings, in every format that people read."""

from skipinit_jax.document.document import (
  Document,
  Entry,
  Figure,
  Finding,
  Section,
  Table,
  command_line,
)
from skipinit_jax.document.pages import fill
from skipinit_jax.document.report import FORMATS, write
from skipinit_jax.document.tables import (
  findings_table,
  markdown,
  print_findings,
  print_table,
)

__all__ = [
  "FORMATS",
  "Document",
  "Entry",
  "Figure",
  "Finding",
  "Section",
  "Table",
  "command_line",
  "fill",
  "findings_table",
  "markdown",
  "print_findings",
  "print_table",
  "write",
]
