"""The version and the versions of Python are the same wherever they stand."""

import re
from pathlib import Path

import yaml

import skipinit_jax

ROOT = Path(__file__).resolve().parent.parent
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")


def read_yaml(name):
  return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_version():
  (version,) = re.findall(r'version="(.*)"', SETUP)
  assert skipinit_jax.__version__ == version
  assert read_yaml("CITATION.cff")["version"] == version
  changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  # Not released yet, or released.
  assert re.search(rf"^## (Unreleased \({version}\)|{version}\b)", changelog, re.M)


def test_workflow_runs_every_version_of_python_that_is_promised():
  promised = re.findall(r"Python :: (3\.\d+)", SETUP)
  jobs = read_yaml(".github/workflows/test.yml")["jobs"]
  assert jobs["test"]["strategy"]["matrix"]["python"] == promised
  assert f'python_requires=">={promised[0]}"' in SETUP
