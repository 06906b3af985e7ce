"""Documents as files: one HTML page, and a file of each table and figure."""

import base64
import json
import os
import pathlib
import re
from collections.abc import Collection, Mapping

from skipinit_jax.document import drawing, tables
from skipinit_jax.document.document import Document, Figure, Table
from skipinit_jax.errors import UsageError, extra, unknown_name
from skipinit_jax.files import Path, workdir_path, write_file

FORMATS = ("md", "png")
"""The formats of tables and figures that a report has unless told otherwise."""

_TABLE_FORMATS = {"md": tables.markdown_file, "tex": tables.latex}
_FIGURE_FORMATS = ("png", "pdf")

# Names become names of files and anchors in the page.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def write(
  document: Document,
  directory: str | os.PathLike[str],
  formats: Collection[str] = FORMATS,
) -> list[Path]:
  """Writes `report.html`, and beside it a file for each table and figure.

  The same document gives the same bytes. Everything is rendered before the first file
  is touched, so that a document that fails leaves an earlier one whole.

  Args:
    directory: where to, or a folder of a bucket; made if it does not exist.
    formats: those of the files beside the page: "md" and "tex" for tables, "png" and
      "pdf" for figures.

  Returns:
    The files, `report.html` first.

  Raises:
    UsageError: a format is unknown, or the directory cannot be written.
    ValueError: two tables or figures share a name, or a name cannot be a file's.
  """
  known = (*_TABLE_FORMATS, *_FIGURE_FORMATS)
  for kind in formats:
    if kind not in known:
      raise unknown_name("format", kind, known)
  contents = [item for section in document.sections for item in section.contents]
  _check_names([item.name for item in contents])

  images = {
    item.name: drawing.image(item.figure)
    for item in contents
    if isinstance(item, Figure)
  }
  files = {"report.html": _html(document, images).encode()}
  for item in contents:
    for kind in formats:
      if isinstance(item, Table) and kind in _TABLE_FORMATS:
        files[f"{item.name}.{kind}"] = _TABLE_FORMATS[kind](item).encode()
      elif isinstance(item, Figure) and kind in _FIGURE_FORMATS:
        is_drawn = kind == "png"
        image = images[item.name] if is_drawn else drawing.image(item.figure, kind)
        files[f"{item.name}.{kind}"] = image

  folder = workdir_path(directory)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
      write_file(folder / name, content)
  except OSError as error:
    raise UsageError(
      f"The report cannot be written to {directory} ({error.strerror}): use another "
      "--workdir or --output."
    ) from None
  return [folder / name for name in files]


def _check_names(names: Collection[str]) -> None:
  seen = set()
  for name in names:
    if not _NAME.fullmatch(name):
      raise ValueError(
        f"{name!r} cannot name a file: use letters, digits, '_' and '-'."
      )
    # Some file systems do not tell the cases apart.
    if name.lower() in seen:
      raise ValueError(f"Two tables or figures are named {name!r}.")
    seen.add(name.lower())


def _html(document: Document, images: Mapping[str, bytes]) -> str:
  with extra("figures"):
    import jinja2

  config = json.dumps(document.config, indent=2, ensure_ascii=False, default=str)
  environment = jinja2.Environment(
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
  )
  template = pathlib.Path(__file__).with_name("report.html")
  return environment.from_string(template.read_text(encoding="utf-8")).render(
    document=document,
    images={name: base64.b64encode(image).decode() for name, image in images.items()},
    entries=tables.entries,
    numeric_columns=tables.numeric_columns,
    config=config,
  )
