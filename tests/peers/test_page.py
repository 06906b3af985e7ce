"""The page of peers names every test of them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_page_names_the_tests():
  page = (ROOT / "docs/equal_to_what.md").read_text(encoding="utf-8")
  tests = {*(ROOT / "tests/peers").glob("test_*.py")} - {Path(__file__)}
  assert all(f"`tests/peers/{path.name}`" in page for path in tests) and tests
