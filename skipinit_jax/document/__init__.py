"""Documents: tables, figures and findings, in every format that people read."""

from skipinit_jax.document.document import (
  Document,
  Entry,
  Figure,
  Finding,
  Section,
  Table,
  command_line,
  markdown,
  print_findings,
  print_table,
  write,
)

__all__ = [
  "Document",
  "Entry",
  "Figure",
  "Finding",
  "Section",
  "Table",
  "command_line",
  "markdown",
  "print_findings",
  "print_table",
  "write",
]
