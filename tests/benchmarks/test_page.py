"""The performance page has the committed measurements."""

import json
from pathlib import Path

import pytest

from benchmarks import page
from skipinit_jax.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "results" / "performance"


def test_the_page_has_the_committed_measurements():
  text = (ROOT / "docs" / "performance.md").read_text("utf-8")
  assert page.fill(text, RESULTS) == text
  # Each measurement is on it.
  for path in RESULTS.glob("*.json"):
    changed = json.loads(path.read_text("utf-8"))
    assert changed["machine"]["cores"] >= 1
    assert any(source == path.stem for source, _ in page._TABLES.values())
  for name in page._TABLES:
    assert f"<!-- table: {name} -->" in text


def test_a_table_is_replaced():
  text = "before\n<!-- table: throughput -->\nold\n<!-- end -->\nafter\n"
  filled = page.fill(text, RESULTS)
  assert "old" not in filled
  assert filled.startswith("before\n<!-- table: throughput -->\n| network and peer |")
  assert filled.endswith("<!-- end -->\nafter\n")


def test_bad_input(tmp_path):
  with pytest.raises(UsageError, match=r"'nothing': there are \['machine'"):
    page.fill("<!-- table: nothing -->\n<!-- end -->", RESULTS)
  with pytest.raises(UsageError, match=r"throughput\.json is missing: `make bench`"):
    page.fill("<!-- table: throughput -->\n<!-- end -->", tmp_path)
