"""Installs what the notebooks need into the Python that runs them.

A Colab runtime comes with JAX built for its accelerator, perhaps in an older version
than this package needs. pip alone would then take a newer JAX without the accelerator's
part, and the notebook would run on the CPU. So this asks for both together. Where they
are new enough, pip leaves them as they are.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

# The module of each build of JAX for an accelerator, and the extra that requires it.
_BUILDS = {
  "libtpu": "tpu",
  "jax_cuda13_plugin": "cuda13",
  "jax_cuda12_plugin": "cuda12",
}


def jax_requirement(is_installed: Callable[[str], bool]) -> str:
  """Returns JAX as the requirement that keeps it built for the same accelerator.

  Args:
    is_installed: whether a module is.
  """
  extras = [extra for module, extra in _BUILDS.items() if is_installed(module)]
  return f"jax[{','.join(extras)}]"


def stale_modules(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
  """Returns the imported modules of which another version was installed.

  Args:
    before: versions of the distributions at the time of the imports.
    after: their versions now.
  """
  distributions = importlib.metadata.packages_distributions()
  return sorted(
    module
    for module, names in distributions.items()
    if module in sys.modules
    and any(before.get(name) != after.get(name) for name in names)
  )


def _versions() -> dict[str, str]:
  return {each.name: each.version for each in importlib.metadata.distributions()}


def main() -> None:
  """Installs this checkout and its requirements.

  Raises:
    RuntimeError: this session has imported what was replaced, so it has to start again.
  """
  before = _versions()
  jax = jax_requirement(lambda name: importlib.util.find_spec(name) is not None)
  checkout = Path(__file__).resolve().parent.parent
  install = [sys.executable, "-m", "pip", "install", "--quiet", "--editable"]
  subprocess.run([*install, str(checkout), jax], check=True)
  importlib.invalidate_caches()
  stale = stale_modules(before, _versions())
  if stale:
    raise RuntimeError(
      f"Everything is installed, but this session still holds the old {stale[0]}: "
      "choose Runtime > Restart session, then run the notebook from its first cell."
    )
