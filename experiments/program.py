"""What every program of this folder shares: its start and its exit statuses."""

import sys
from collections.abc import Callable, Sequence

from absl import app

from skipinit_jax.errors import UsageError

USAGE_ERROR_STATUS = 1


def run(main: Callable[[], int | None]) -> None:
  """Parses the flags and runs `main`; its return value is the exit status.

  A `UsageError` becomes one sentence on standard error and status 1.
  """

  def guarded(argv: Sequence[str]) -> int | None:
    try:
      if len(argv) > 1:
        raise UsageError(
          f"Unexpected argument {argv[1]!r}: every option is a flag; see --help."
        )
      return main()
    except UsageError as error:
      print(f"error: {error}", file=sys.stderr)
      return USAGE_ERROR_STATUS

  app.run(guarded)
