"""What stands beside the code: citation, changelog, continuous integration, hooks.

Nothing runs these files here, so that a name that changed elsewhere goes unnoticed.
"""

import re
from pathlib import Path

import yaml

import skipinit_jax

ROOT = Path(__file__).resolve().parent.parent
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
# Tabs begin the commands of a target, which ends at the first other line.
TARGETS = dict(re.findall(r"^(\w+):.*\n((?:\t.*\n)*)", MAKEFILE, flags=re.MULTILINE))
COMMANDS_OF_TEST = TARGETS["test"].replace("$(VENV)", ".venv")


def read_yaml(name):
  return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def targets_made_by(script):
  """Returns the targets of the Makefile that a shell script makes."""
  return set(re.findall(r"^make (\w+)$", script, flags=re.MULTILINE))


def test_version_is_that_of_setup_py():
  (version,) = re.findall(r'version="(.*)"', SETUP)
  assert skipinit_jax.__version__ == version
  changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  # Not released yet, or released.
  assert re.search(rf"^## (Unreleased \({version}\)|{version}\b)", changelog, re.M)


def test_citation_file_has_what_its_format_requires():
  citation = read_yaml("CITATION.cff")
  assert citation["cff-version"] == "1.2.0"
  assert citation["title"] == "skipinit_jax"
  assert citation["version"] == skipinit_jax.__version__
  assert f'license_expression="{citation["license"]}"' in SETUP
  assert citation["message"] and citation["type"] == "software"
  (paper,) = citation["references"]
  for work in (citation, paper):
    # A person has no `name`, and an organization nothing else.
    for author in work["authors"]:
      assert set(author) in ({"name"}, {"family-names", "given-names"})
  assert {"type", "title", "authors"} < set(paper)
  assert "name" in paper["conference"]


def test_workflow_makes_targets_that_exist():
  jobs = read_yaml(".github/workflows/test.yml")["jobs"]
  made = set()
  for job in jobs.values():
    for step in job["steps"]:
      script = step.get("run", "")
      made |= targets_made_by(script)
      if ".ci/run" in script:
        made |= targets_made_by((ROOT / ".ci/run").read_text(encoding="utf-8"))
  assert {"test", "demo"} <= made <= set(TARGETS)


def test_workflow_runs_every_version_of_python_that_is_promised():
  promised = re.findall(r"Python :: (3\.\d+)", SETUP)
  jobs = read_yaml(".github/workflows/test.yml")["jobs"]
  assert jobs["test"]["strategy"]["matrix"]["python"] == promised
  assert f'python_requires=">={promised[0]}"' in SETUP


def test_hooks_are_commands_of_make_test():
  lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
  repositories = read_yaml(".pre-commit-config.yaml")["repos"]
  # Those of the environment: others would come with versions of their own.
  assert {each["repo"] for each in repositories} == {"local"}
  hooks = [hook for each in repositories for hook in each["hooks"]]
  assert hooks
  for hook in hooks:
    assert hook["language"] == "system"
    # pre-commit names the files that a commit changes, also those ruff would leave out.
    command = hook["entry"].replace(" --force-exclude", "")
    assert f"\t{command} .\n" in COMMANDS_OF_TEST, command
    tool = command.split()[0].removeprefix(".venv/bin/")
    assert re.search(rf"^{tool}==", lock, re.M), tool
