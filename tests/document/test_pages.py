"""Places in pages are filled with tables and words."""

from skipinit_jax.document import Table, fill

FOUND = {"a/table": Table("table", "", ["x"], [["1"], ["2"]]), "a/words": "1 of 2"}
PAGE = """Before <!-- results: a/words -->{words}<!-- end -->.

<!-- results: a/table -->
{table}<!-- end -->
<!-- another comment -->
"""
TABLE = "| x |\n| ---: |\n| 1 |\n| 2 |\n"


def test_places_are_filled_and_the_rest_stays():
  filled = PAGE.format(words="1 of 2", table=TABLE)
  empty = PAGE.format(words="", table="")
  assert fill(empty, FOUND.get) == (filled, ["a/words", "a/table"])
  old = PAGE.format(words="1 of 2", table="| y |\n")
  assert fill(old, FOUND.get) == (filled, ["a/table"])
  assert fill(filled, FOUND.get) == (filled, [])
