"""How benchmarks tell what they measured: tables for people, JSON for pages."""

import json
from typing import Any

import rich.console
import rich.table


def make_table(*columns: str, title: str | None = None) -> rich.table.Table:
  """Returns a table without rows, with its title above the first column."""
  return rich.table.Table(*columns, title=title, title_justify="left")


def show(results: Any, *tables: rich.table.Table) -> None:
  """Prints tables to standard error, and one JSON object to standard output."""
  console = rich.console.Console(stderr=True, width=120)
  for table in tables:
    console.print(table)
  print(json.dumps(results, indent=2))
