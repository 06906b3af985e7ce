"""Errors that a user can correct."""

import pytest

from skipinit_jax.errors import UsageError, unknown_name

MANY = [f"fruit_{number}" for number in range(100)]


@pytest.mark.parametrize(
  ("name", "known", "message"),
  [
    (3, ("pear", "apple"), "Unknown fruit 3: choose one of apple, pear."),
    ("aple", ("pear", "apple"), "(did you mean 'apple'?): choose one of apple, pear."),
    # Many are listed only where none is suggested.
    ("fruit_7", MANY, "Unknown fruit 'fruit_7' (did you mean 'fruit_7'?)."),
    ("stone", MANY, f": choose one of {', '.join(sorted(MANY))}."),
  ],
)
def test_unknown_name_lists_and_suggests(name, known, message):
  error = unknown_name("fruit", name, known)
  assert isinstance(error, UsageError) and isinstance(error, ValueError)
  assert str(error).endswith(message)
