"""The public interface: its names, their documentation and their types.

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
INTERNAL = {"skipinit_jax.cores", "skipinit_jax.files"}


def public_modules():
  found = pkgutil.walk_packages(skipinit_jax.__path__, "skipinit_jax.")
  names = ["skipinit_jax", *(module.name for module in found)]
  modules = [importlib.import_module(name) for name in names]
  return [module for module in modules if hasattr(module, "__all__")]


MODULES = public_modules()


def public_objects():
  """Yields names and objects; of an object with several, the shortest."""
  seen = {}
  for module in MODULES:
    for name in module.__all__:
      obj = getattr(module, name)
      if not inspect.ismodule(obj):
        known = seen.setdefault(id(obj), (f"{module.__name__}.{name}", obj))
        if len(known[0]) > len(module.__name__) + 1 + len(name):
          seen[id(obj)] = (f"{module.__name__}.{name}", obj)
  return sorted(seen.values(), key=lambda pair: pair[0])


def test_no_name_is_added_or_lost_by_accident():
  listed = set(LISTING.read_text().split())
  exported = {
    f"{module.__name__}.{name}" for module in MODULES for name in module.__all__
  }
  added, lost = sorted(exported - listed), sorted(listed - exported)
  assert not added and not lost, (
    f"Added: {added}. Lost: {lost}. If that is meant, change tests/public_api.txt, "
    "and tell users in CHANGELOG.md."
  )


def test_what_is_reached_by_name_says_what_it_exports():
  public = {module.__name__ for module in MODULES}
  for module in pkgutil.iter_modules(skipinit_jax.__path__, "skipinit_jax."):
    assert module.name in public | INTERNAL
  for module in MODULES:
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
      if inspect.ismodule(obj := getattr(module, name)):
        assert obj.__name__ in public, f"{obj.__name__} has no __all__"


def test_public_modules_have_docstrings():
  assert [module.__name__ for module in MODULES if not module.__doc__] == []


def functions_of(obj):
  """Yields a function, or the public ones of a class."""
  if inspect.isfunction(obj):
    yield obj
    return
  for name, member in vars(obj).items():
    if isinstance(member, classmethod | staticmethod):
      member = member.__func__
    if isinstance(member, property):
      member = member.fget
    # Methods of other modules were generated, such as those of a dataclass.
    if not inspect.isfunction(member) or member.__module__ != obj.__module__:
      continue
    written = member.__code__.co_filename.endswith(".py")
    if written and (not name.startswith("_") or name in ("__init__", "__call__")):
      yield member


def test_public_code_is_documented_and_annotated():
  code = [
    (name, obj)
    for name, obj in public_objects()
    if inspect.isfunction(obj) or inspect.isclass(obj)
    if obj.__module__.startswith("skipinit_jax")
  ]
  assert len(code) > 100
  lacking = []
  for name, obj in code:
    # A dataclass without a docstring gets its signature.
    if not obj.__doc__ or obj.__doc__.startswith(f"{obj.__name__}("):
      lacking.append(name)
    for function in functions_of(obj):
      signature = inspect.signature(function)
      annotations = [signature.return_annotation] + [
        parameter.annotation
        for index, parameter in enumerate(signature.parameters.values())
        if index or parameter.name not in ("self", "cls")
      ]
      documented = function.__doc__ or function.__name__ == "__init__"
      if not documented or signature.empty in annotations:
        lacking.append(f"{name}: {function.__qualname__}")
  assert lacking == []


def test_import_stays_light():
  heavy = (
    "cv2 grain jinja2 matplotlib ml_collections optuna orbax sklearn sqlalchemy "
    "tensorboardX tensorflow tensorflow_datasets"
  )
  program = (
    "import sys, skipinit_jax; "
    f"print(*(name for name in {heavy.split()} if name in sys.modules))"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT,
    check=True,
    capture_output=True,
    text=True,
  )
  assert done.stdout.split() == []
