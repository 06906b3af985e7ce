"""The names of the public interface. ruff and mypy see to documentation and types.

A module is public if it has `__all__`: the packages, the modules beside them, and those
that a package's `__all__` names. tests/public_api.txt lists what they export. A change
there is a change for users: say it in CHANGELOG.md.
"""

import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import skipinit_jax

ROOT = Path(__file__).resolve().parent.parent
LISTING = ROOT / "tests/public_api.txt"
# Beside the packages, but for themselves.
INTERNAL = {f"skipinit_jax.{name}" for name in ("__main__", "cores", "fields", "files")}


def public_modules():
  found = pkgutil.walk_packages(skipinit_jax.__path__, "skipinit_jax.")
  names = ["skipinit_jax", *(module.name for module in found)]
  modules = [importlib.import_module(name) for name in names]
  return [module for module in modules if hasattr(module, "__all__")]


MODULES = public_modules()


def test_no_name_is_added_or_lost_by_accident():
  exported = sorted(
    f"{module.__name__}.{name}" for module in MODULES for name in module.__all__
  )
  # If a difference is meant, change the list, and tell users in CHANGELOG.md.
  assert exported == sorted(LISTING.read_text().split())


def test_what_is_reached_by_name_says_what_it_exports():
  public = {module.__name__ for module in MODULES}
  for module in pkgutil.iter_modules(skipinit_jax.__path__, "skipinit_jax."):
    assert module.name in public | INTERNAL
  for module in MODULES:
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
      if inspect.ismodule(obj := getattr(module, name)):
        assert obj.__name__ in public, f"{obj.__name__} has no __all__"


def test_import_stays_light():
  heavy = (
    "cv2 grain jinja2 matplotlib ml_collections optuna orbax sklearn sqlalchemy "
    "tensorboardX tensorflow tensorflow_datasets"
  )
  # Nor is code for training needed to use a network.
  program = f"""
import sys
sys.modules["optax"] = sys.modules["skipinit_jax.training"] = None
import skipinit_jax.convert, skipinit_jax.export, skipinit_jax.models
print(*(name for name in {heavy.split()} if name in sys.modules))
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  assert done.stdout.split() == []
