"""The wheel: what is inside, and that it works away from the checkout."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent

# Everything in a checkout that is not the project.
NOT_SOURCES = shutil.ignore_patterns(
  ".*", "__pycache__", "_build", "build", "dist", "runs", "*.egg-info"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A wheel built from a copy, so that nothing of an earlier build gets into it."""
  folder = tmp_path_factory.mktemp("wheel")
  shutil.copytree(ROOT, folder / "project", symlinks=True, ignore=NOT_SOURCES)
  build = "import setuptools.build_meta as m, sys; m.build_wheel(sys.argv[1])"
  subprocess.run(
    [sys.executable, "-c", build, str(folder)],
    cwd=folder / "project",
    check=True,
    stdout=subprocess.DEVNULL,
  )
  (built,) = folder.glob("*.whl")
  return built


def test_wheel_holds_the_package_and_nothing_else(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  project, version, *_ = wheel.name.split("-")
  folders = {name.split("/")[0] for name in names}
  assert folders == {"skipinit_jax", f"{project}-{version}.dist-info"}
  assert "skipinit_jax/py.typed" in names
  assert "skipinit_jax/document/report.html" in names
  assert "skipinit_jax/programs/experiments/train.py" in names
  assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
  modules = {
    path.relative_to(ROOT).as_posix() for path in (ROOT / "skipinit_jax").rglob("*.py")
  }
  assert modules <= set(names), "a folder of the package has no __init__.py"


def test_installed_wheel_imports_and_loads_digits(wheel, tmp_path):
  # A pure Python wheel is installed by unpacking it. The environment of the tests
  # provides what it requires; python -I and another folder keep the checkout out.
  site = tmp_path / "site"
  zipfile.ZipFile(wheel).extractall(site)
  program = f"""
import importlib, importlib.util, pkgutil, sys
sys.path.insert(0, {str(site)!r})
import skipinit_jax
import skipinit_jax.__main__ as command
assert command.FOLDER.parts[-2:] == ("skipinit_jax", "programs")
assert skipinit_jax.__file__.startswith({str(site)!r}), skipinit_jax.__file__
for module in pkgutil.walk_packages(skipinit_jax.__path__, "skipinit_jax."):
  importlib.import_module(module.name)
assert importlib.util.find_spec("experiments") is None
from skipinit_jax import data
data.load("digits")
sys.argv = ["skipinit-jax", "train", "--help"]
command.main()
"""
  done = subprocess.run(
    [sys.executable, "-I", "-c", program],
    cwd=tmp_path,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert "skipinit-jax train --workdir=/tmp/run" in done.stdout


def test_core_alone_runs_the_snippets_of_the_readme(wheel, tmp_path, child_environment):
  uv, python = Path(sys.executable).with_name("uv"), tmp_path / "core/bin/python"
  if not uv.exists():
    pytest.skip("uv is not installed")
  subprocess.run(
    [uv, "venv", "-q", "-p", sys.executable, tmp_path / "core"], check=True
  )
  pins = ["--constraint", str(ROOT / "requirements.lock")]
  done = subprocess.run(
    [uv, "pip", "install", "-q", "-p", python, *pins, wheel],
    capture_output=True,
    text=True,
  )
  if "Failed to fetch" in done.stderr or "error sending request" in done.stderr:
    pytest.skip("the registry of packages cannot be reached")
  assert done.returncode == 0, done.stderr
  installed = {path.name for path in python.parents[1].glob("lib/*/site-packages/*")}
  assert not installed & {"filelock", "matplotlib", "optuna", "sklearn", "cv2", "grain"}

  readme = (ROOT / "README.md").read_text(encoding="utf-8")
  (snippet,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
  program = f"""
import skipinit_jax
{snippet.replace("WideResNet(100, 2,", "WideResNet(10, 1,")}
for use in (
  lambda: skipinit_jax.studies,
  lambda: skipinit_jax.data.load("digits"),
  lambda: skipinit_jax.analysis.figures.ratio_figure([]),
):
  try:
    use()
  except skipinit_jax.errors.MissingPackageError as error:
    print(error)
"""
  environment = child_environment()
  done = subprocess.run(
    [python, "-I", "-c", program], env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  verdict, *missing = done.stdout.splitlines()
  assert verdict.startswith("The signal passes all 3 blocks")
  assert missing == [
    f"{name} is not installed: pip install 'skipinit_jax[{extra}]' brings it."
    for name, extra in (
      ("optuna", "studies"),
      ("scikit-learn", "train"),
      ("matplotlib", "figures"),
    )
  ]
  command = [python.with_name("skipinit-jax"), "train", f"--workdir={tmp_path / 'run'}"]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (1, "")
  assert re.fullmatch(r"error: .*'skipinit_jax\[train\]' brings it\.\n", done.stderr)


def test_lock_pins_everything_that_is_required(wheel):
  archive = zipfile.ZipFile(wheel)
  (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
  metadata = email.message_from_bytes(archive.read(name))
  lines = (ROOT / "requirements.lock").read_text().splitlines()
  pins = [Requirement(line) for line in lines if not line.startswith("#")]
  pinned = {
    canonicalize_name(pin.name): str(pin.specifier).removeprefix("==")
    for pin in pins
    if pin.marker is None or pin.marker.evaluate()
  }
  for line in metadata.get_all("Requires-Dist"):
    needed = Requirement(line)
    if needed.marker is None or needed.marker.evaluate({"extra": "tests"}):
      assert pinned[canonicalize_name(needed.name)] in needed.specifier, line
