"""Errors that a user can correct."""

import difflib
from collections.abc import Iterable

__all__ = [
  "UsageError",
  "unknown_name",
]


class UsageError(ValueError):
  """An argument, flag or file that the user can correct.

  The message is one sentence that names the argument, its value and what is
  allowed. Programs print it alone, without a traceback, and exit with status 1.
  """


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
  """Returns the error for a name that is not in a table of names.

  Args:
    kind: what the name stands for, such as "method".
    name: the name that was given.
    known: the names that exist.

  Returns:
    An error that lists the known names and, where one is close, suggests it.
  """
  known = sorted(known)
  close = difflib.get_close_matches(str(name), known, n=1)
  suggestion = f" (did you mean {close[0]!r}?)" if close else ""
  names = ", ".join(known)
  return UsageError(f"Unknown {kind} {name!r}{suggestion}: choose one of {names}.")
