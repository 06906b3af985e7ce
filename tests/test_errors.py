"""Errors that a user can correct."""

import pytest

from skipinit_jax.errors import UsageError, require_positive, unknown_name


def test_usage_error_is_a_value_error():
  assert issubclass(UsageError, ValueError)


def test_unknown_name_lists_what_exists_in_order():
  error = unknown_name("fruit", "stone", ("pear", "apple"))
  assert isinstance(error, UsageError)
  assert str(error) == "Unknown fruit 'stone': choose one of apple, pear."


def test_unknown_name_suggests_a_close_one():
  error = unknown_name("fruit", "aple", ("pear", "apple"))
  assert str(error) == (
    "Unknown fruit 'aple' (did you mean 'apple'?): choose one of apple, pear."
  )


def test_unknown_name_lists_many_only_where_it_suggests_none():
  known = [f"fruit_{number}" for number in range(100)]
  suggested = str(unknown_name("fruit", "fruit_7x", known))
  assert suggested.startswith("Unknown fruit 'fruit_7x' (did you mean 'fruit_7")
  assert suggested.endswith("'?).")
  assert ": choose one of fruit_0, " in str(unknown_name("fruit", "stone", known))


def test_unknown_name_accepts_what_is_no_string():
  assert "Unknown version 3: choose" in str(unknown_name("version", 3, ("1", "2")))


def test_require_positive():
  require_positive(width=1, depth=10)
  with pytest.raises(UsageError, match="depth is 0: it must be at least 1"):
    require_positive(width=1, depth=0)
