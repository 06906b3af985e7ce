"""Results in pages: what stands between two comments is made from files.

    <!-- results: digits/accuracy -->
    | network | Batch norm | SkipInit, α = 0 |
    <!-- end -->

Neither GitHub nor the site shows the comments. Within a line, they hold a few words.
"""

import re
from collections.abc import Callable

from skipinit_jax.document.document import Table
from skipinit_jax.document.tables import markdown

_PLACE = re.compile(r"(<!-- results: (\S+) -->)(\n?)(.*?)(<!-- end -->)", re.DOTALL)


def fill(page: str, find: Callable[[str], Table | str]) -> tuple[str, list[str]]:
  """Fills a page's places with results.

  Args:
    page: its Markdown.
    find: returns what belongs into the place of a name, a table or words.

  Returns:
    The page with its results, and the names of the places that were different.
  """
  different = []

  def replace(place: re.Match[str]) -> str:
    begin, name, newline, old, end = place.groups()
    found = find(name)
    new = markdown(found) if isinstance(found, Table) else f"{found}{newline}"
    if new != old:
      different.append(name)
    return f"{begin}{newline}{new}{end}"

  return _PLACE.sub(replace, page), different
