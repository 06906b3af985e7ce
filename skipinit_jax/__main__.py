"""Runs a program: `skipinit-jax NAME ...` as `python -m experiments.NAME ...`.

A checkout has the folder of programs beside the package, a wheel within it.
"""

import ast
import pathlib
import runpy
import shutil
import sys
import textwrap

from skipinit_jax.errors import MissingPackageError, UsageError, unknown_name

_PACKAGE = pathlib.Path(__file__).parent
_WITHIN = _PACKAGE / "programs"
FOLDER = _WITHIN if _WITHIN.is_dir() else _PACKAGE.parent
"""What has the folder `experiments`, to be on Python's path."""


def _programs() -> dict[str, str]:
  """Returns the first line that each program says of itself, by its name."""
  programs = {}
  for path in sorted((FOLDER / "experiments").glob("*.py")):
    text = path.read_text("utf-8")
    if "  program.run(" in text.partition('if __name__ == "__main__":')[2]:
      description = ast.get_docstring(ast.parse(text)) or ""
      programs[path.stem] = description.partition("\n")[0]
  return programs


def main() -> None:
  """Runs the program that the first argument names."""
  name, *arguments = sys.argv[1:] or ["--help"]
  programs = _programs()
  if name in ("--help", "-h"):
    print("skipinit-jax NAME FLAGS...; skipinit-jax NAME --help lists the flags.\n")
    columns, indent = max(60, shutil.get_terminal_size().columns), " " * 24
    for each, text in programs.items():
      begin = f"  {each:22}"
      print(
        textwrap.fill(text, columns, initial_indent=begin, subsequent_indent=indent)
      )
    return
  try:
    if name not in programs:
      raise unknown_name("program", name, programs)
    sys.path.insert(0, str(FOLDER))
    # As Python's own -m: `experiments` takes the streams and signals at that.
    sys.argv = ["-m", *arguments]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
  except (MissingPackageError, UsageError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  main()
