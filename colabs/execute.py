"""Executes the notebooks of this folder in place: what they print and draw is new.

    make colabs

What differs whenever a notebook is executed is left out, so that the same notebook
gives the same file.
"""

import argparse
import base64
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

from skipinit_jax.document import drawing

FOLDER = Path(__file__).resolve().parent
NOTEBOOKS = ("thousand_layers", "your_own_network", "run_a_study")

_KERNEL = "python3"
_METADATA = {
  # Colab's own mark.
  "colab": {"provenance": []},
  "kernelspec": {"display_name": "Python 3", "language": "python", "name": _KERNEL},
  # Sphinx stumbles over a shell's command in a cell of plain Python.
  "language_info": {"name": "python", "pygments_lexer": "ipython3"},
}


def read(name: str) -> NotebookNode:
  """Returns the notebook of this name."""
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(
  notebook: NotebookNode,
  folder: str | os.PathLike[str],
  *,
  env: Mapping[str, str] | None = None,
) -> None:
  """Executes a notebook in place, in a kernel of this very Python.

  Args:
    notebook: its code cells get outputs and numbers.
    folder: working directory of the kernel.
    env: environment of the kernel; None: this process's. The kernel finds the modules
      of the checkout in any case.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell failed.
  """
  environment = dict(os.environ if env is None else env)
  paths = [str(FOLDER.parent), environment.get("PYTHONPATH", "")]
  environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
  with tempfile.TemporaryDirectory() as kernels:
    # The user's own kernel of this name may belong to another Python.
    write_kernel_spec(Path(kernels, _KERNEL))
    client = NotebookClient(
      notebook,
      config=Config({"KernelSpecManager": {"kernel_dirs": [kernels]}}),
      kernel_name=_KERNEL,
      timeout=None,
      # On a busy machine a minute is not enough.
      startup_timeout=300,
      resources={"metadata": {"path": str(folder)}},
      record_timing=False,
      coalesce_streams=True,
    )
    client.execute(env=environment)


def strip(notebook: NotebookNode, folder: str) -> None:
  """Removes from an executed notebook what differs whenever it is executed.

  That includes standard error, where libraries say something about the machine, and
  `folder`, where the notebook was executed.
  """
  notebook.metadata = nbformat.from_dict(_METADATA)
  for index, cell in enumerate(notebook.cells):
    # What the site needs stays: a figure's text for who cannot see it.
    kept = {key: value for key, value in cell.metadata.items() if key == "mystnb"}
    cell.id, cell.metadata = f"cell-{index}", kept
    if cell.cell_type != "code":
      continue
    cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    for output in cell.outputs:
      if "metadata" in output:
        output.metadata = {}
      if "text" in output:
        # The progress of a study, "3 done, 7 left, 0:00:05 passed, about ... left".
        text = re.sub(r", \d+:\d\d:\d\d passed, [^\]]* left\]", "]", output.text)
        output.text = text.replace(f"{folder}/", "")
      if "image/png" in output.get("data", {}):
        png = base64.b64decode(output.data["image/png"])
        smaller = drawing.with_few_colors(png)
        output.data["image/png"] = base64.b64encode(smaller).decode()


def main() -> None:
  """Executes the notebooks that the command names, or all."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NOTEBOOKS))
  for name in parser.parse_args().names or NOTEBOOKS:
    path, notebook = FOLDER / f"{name}.ipynb", read(name)
    with tempfile.TemporaryDirectory() as folder:
      execute(notebook, folder)
    strip(notebook, os.path.realpath(folder))
    nbformat.write(notebook, path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
  main()
