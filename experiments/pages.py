"""Fills the tables of README.md and docs/ with the results in results/.

A place for a result stands between two comments, of which the first names the folder
of results/ and the table:

  <!-- results: digits/accuracy -->
  <!-- end -->

A number with a unit that stands elsewhere needs a source: a table of the same page that
has it, or a link in its paragraph. Numbers of docs/how_to are those of code that the
tests run.

It also puts the repository's address, which pyproject.toml has, into the notebooks.

Examples:
  python -m experiments.pages
  python -m experiments.pages --check
"""

import functools
import pathlib
import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags

from benchmarks import benchmark, scaling_model
from experiments import program
from skipinit_jax import document, studies
from skipinit_jax.document import Table
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.files import read_json
from skipinit_jax.studies import batch_size, regularization

_CHECK = flags.DEFINE_bool(
  "check",
  False,
  "Changes nothing, and fails if a page differs from the results, or has a number "
  "without a source.",
)

_ROOT = pathlib.Path(__file__).parents[1]


def _batch_size(results: batch_size.Results) -> Mapping[str, Table | str]:
  gaps = batch_size.batch_norm_gaps(results)
  return {
    "gap_at_smallest": str(gaps[min(gaps)]),
    "gap_at_largest": str(gaps[max(gaps)]),
  }


def _regularization(results: regularization.Results) -> Mapping[str, Table | str]:
  return {
    "gains": regularization.gains_table(results),
    "gain_of_both": str(regularization.gain_of_both(results)),
  }


_MORE_TABLES: Mapping[str, Callable[[Any], Mapping[str, Table | str]]] = {
  "batch_size_study": _batch_size,
  "regularization_study": _regularization,
}


def _performance(folder: pathlib.Path) -> Mapping[str, Table | str]:
  machine = benchmark.describe_machine(read_json(folder / "throughput.json"))
  return {**benchmark.read_tables(folder), "machine": machine}


def _diagnosis(folder: pathlib.Path) -> Mapping[str, Table | str]:
  def read(name: str) -> dict[tuple[str, str, int], Any]:
    rows = read_json(folder / name)["cells"]
    return {(row["family"], row["variant"], row["depth"]): row for row in rows}

  cells = read("diagnosis.json")
  # By the limits that there were when a cell was trained, where they were others.
  first = read("first_verdicts.json")

  def agreement(*parts: str, verdicts: Mapping[tuple[str, str, int], Any]) -> str:
    agrees = [
      healthy == cell["trains"][name]
      for key, cell in cells.items()
      if cell["part"] in parts
      for name, healthy in verdicts[key]["healthy"].items()
    ]
    return f"{sum(agrees)} of {len(agrees)}"

  parts = {cell["part"] for cell in cells.values()}
  return {
    **benchmark.read_tables(folder),
    **{f"agreement_{part}": agreement(part, verdicts=cells) for part in parts},
    "agreement_first": agreement("judged", verdicts=first),
    "agreement": agreement("judged", "fresh", "last", verdicts=cells | first),
  }


def _study(folder: pathlib.Path) -> Mapping[str, Table | str]:
  results = studies.read_results(folder)
  claims = studies.get_kind(results.name).claims(results)
  more = _MORE_TABLES.get(results.name, lambda results: {})
  return {
    "accuracy": studies.accuracy_table(results),
    "claims": document.findings_table(claims),
    **more(results),
  }


def _address(root: pathlib.Path) -> str:
  tools = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]
  address: str = tools["skipinit_jax"]["repository"]
  return address


def _badge(address: str, name: str) -> str:
  colab, place = "https://colab.research.google.com", address.partition("://")[2]
  notebook = f"{colab}/{place.replace('.com', '', 1)}/blob/main/colabs/{name}.ipynb"
  return f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({notebook})"


def _repository(folder: pathlib.Path) -> Mapping[str, Table | str]:
  root = folder.parents[1]
  address, names = _address(root), sorted(root.glob("colabs/*.ipynb"))
  badges = [f"{path.stem} {_badge(address, path.stem)}" for path in names]
  return {"badges": "Notebooks in Colab: " + ", ".join(badges) if address else ""}


def link_notebook(text: str, name: str, address: str) -> str:
  """Returns a notebook with the repository's address in its first cell and its links.

  Args:
    text: its file, JSON.
    name: its file's name, without the suffix.
    address: of the repository; empty: there is none, so links are relative, and there
      is no badge.
  """
  blank = '    "\\n",\n'
  text = re.sub(rf' *"\[!\[Open in Colab.*\n{re.escape(blank)}', "", text)
  text = re.sub(r'(REPOSITORY = \\")[^"\\]*', rf"\g<1>{address}", text)
  base = f"{address}/blob/main" if address else ".."
  links = r"\]\((?:\.\.|https://[^\s)]*/blob/main)/(?=(?:colabs|docs)/)"
  text = re.sub(links, f"]({base}/", text)
  if not address:
    return text
  badge = f'    "{_badge(address, name)}\\n",\n'
  return text.replace(blank, blank + badge + blank, 1)


_FILLED = re.compile(r"<!-- results:.*?<!-- end -->", re.DOTALL)
_NOT_PROSE = re.compile(r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]*`", re.DOTALL)
_LINK = re.compile(r"\]\((?!#)[^)]*\)")
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_UNITS = (
  r"\s?%|\s(?:times|percent|points|seconds?|minutes?|hours?|ms|μs|milliseconds|"
  r"[KMG]B|[GT]FLOP\S*|images/s)\b"
)
_MEASURED = re.compile(rf"(?<![\w.\-/]){_NUMBER}(?={_UNITS})")


def without_source(page: str) -> list[str]:
  """Returns the numbers with a unit of which a page does not say where they are from.

  A table that is filled in has the same number, or the paragraph has a link.
  """
  shown = set(re.findall(_NUMBER, " ".join(_FILLED.findall(page))))
  prose = _NOT_PROSE.sub("", _FILLED.sub("", page))
  return [
    number
    for paragraph in re.split(r"\n\n|\n(?=- )", prose)
    if not _LINK.search(paragraph)
    for number in _MEASURED.findall(paragraph)
    if number not in shown
  ]


_FOLDERS = {
  "compiled_peers": benchmark.read_tables,
  "diagnosis": _diagnosis,
  "performance": _performance,
  "repair": benchmark.read_tables,
  "repository": _repository,
  "scaling": scaling_model.read_tables,
  "storm": benchmark.read_tables,
}


def fill(root: pathlib.Path, *, check: bool = False) -> list[pathlib.Path]:
  """Fills README.md, all pages in docs/ and the notebooks.

  Args:
    root: the folder that has them, and results/.
    check: whether to fail where a page would change.

  Returns:
    The pages that have changed.

  Raises:
    UsageError: a page names a result that there is none of; or it is only checked, and
      differs from the results or has a number without a source.
  """

  @functools.cache
  def results(folder: str) -> Mapping[str, Table | str]:
    return _FOLDERS.get(folder, _study)(root / "results" / folder)

  def find(place: str) -> Table | str:
    folder, _, name = place.partition("/")
    found = results(folder)
    if name not in found:
      raise unknown_name(f"result of results/{folder}", name, found)
    return found[name]

  changed = []

  def put(path: pathlib.Path, page: str, difference: str) -> None:
    if page == path.read_text("utf-8"):
      return
    if check:
      raise UsageError(f"{difference}: run `python -m experiments.pages`.")
    path.write_text(page, "utf-8")
    changed.append(path)

  for path in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
    page, different = document.fill(path.read_text("utf-8"), find)
    name = path.relative_to(root)
    if check and "how_to" not in name.parts and (numbers := without_source(page)):
      raise UsageError(
        f"In {name}, {', '.join(numbers)} stand outside of the filled tables and "
        "without a link to where they are from."
      )
    put(path, page, f"In {name}, {', '.join(different)} differ from the results")
  for path in sorted(root.glob("colabs/*.ipynb")):
    page = link_notebook(path.read_text("utf-8"), path.stem, _address(root))
    name = path.relative_to(root)
    put(path, page, f"{name} has another address of the repository than pyproject.toml")
  return changed


def main() -> None:
  """Runs the program."""
  for path in fill(_ROOT, check=_CHECK.value):
    print(f"Filled: {path.relative_to(_ROOT)}")


if __name__ == "__main__":
  program.run(main)
