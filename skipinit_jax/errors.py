"""Errors that a user can correct."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = [
  "MissingPackageError",
  "UsageError",
  "extra",
  "misfit",
  "require_positive",
  "unexpected_argument",
  "unknown_name",
]


# Nobody reads more names than that where the right one is suggested.
_MOST_NAMES = 30
# Weights of another network differ in hundreds of names.
_MOST_PROBLEMS = 8


class UsageError(ValueError):
  """An argument, flag or file that the user can correct.

  The message is one sentence that names the argument, its value and what is
  allowed. Programs print it alone, without a traceback, and exit with status 1.
  """


class MissingPackageError(UsageError, ImportError):
  """A package that an extra of this one installs, and that is not installed."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
  """Says which extra installs what the block imports, where that is missing.

  Args:
    name: the extra, by its name in setup.py, such as "train".

  Raises:
    MissingPackageError: the block imports a package that is not installed.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    raise MissingPackageError(
      f"{error.name} is not installed: pip install 'skipinit_jax[{name}]' brings it."
    ) from None


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
  """Returns the error for a name that is not in a table of names.

  Args:
    kind: what the name stands for, such as "method".

  Returns:
    An error that suggests a name that is close, and lists the known names, unless they
    are many and one is suggested.
  """
  known = sorted(known)
  close = difflib.get_close_matches(str(name), known, n=1)
  suggestion = f" (did you mean {close[0]!r}?)" if close else ""
  names = f": choose one of {', '.join(known)}"
  if close and len(known) > _MOST_NAMES:
    names = ""
  return UsageError(f"Unknown {kind} {name!r}{suggestion}{names}.")


def unexpected_argument(argument: str) -> UsageError:
  """Returns the error for an argument of a program that is not a flag."""
  # Up to where a database's password may be.
  shown = re.split("[:=@]", argument)[0]
  return UsageError(f"Unexpected argument {shown!r}: every option is a flag.")


def require_positive(**values: int) -> None:
  """Raises a `UsageError` that names the first value below one."""
  for name, value in values.items():
    if value < 1:
      raise UsageError(f"{name} is {value}: it must be at least 1.")


def misfit(
  expected: Mapping[str, Sequence[int]], actual: Mapping[str, Sequence[int]]
) -> str:
  """Returns how arrays differ from what is expected, by their shapes by name.

  Returns:
    Such as "'a' and 'b' are missing, 'c' is unknown, 'd' has shape (3,), not (4,)",
    with the first few names of each kind; empty where all fit.
  """

  def some(clauses: list[str]) -> str:
    rest = len(clauses) - _MOST_PROBLEMS
    shown = ", ".join(clauses[:_MOST_PROBLEMS])
    return f"{shown} and {rest} more" if rest > 0 else shown

  clauses = []
  for adjective, names in (
    ("missing", [repr(name) for name in expected if name not in actual]),
    ("unknown", [repr(name) for name in actual if name not in expected]),
  ):
    if names:
      clauses.append(f"{some(names)} {'is' if len(names) == 1 else 'are'} {adjective}")
  shapes = [
    f"{name!r} has shape {tuple(actual[name])}, not {tuple(shape)}"
    for name, shape in expected.items()
    if name in actual and tuple(actual[name]) != tuple(shape)
  ]
  return ", ".join([*clauses, some(shapes)] if shapes else clauses)
