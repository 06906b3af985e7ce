"""Every command of the README and of the pages can be copied and pasted.

Commands of our own programs run in a smoke mode, up to where they would begin to
compute; those of others are checked as far as this machine knows them.
"""

import re
import shlex
import subprocess

import pytest

from tests.forks import ROOT

PAGES = sorted(
  path.relative_to(ROOT)
  for path in [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "how_to").glob("*.md"),
  ]
)
PYTHON = (".venv/bin/python", "python", "python3")


def read(page):
  return (ROOT / page).read_text(encoding="utf-8")


def blocks(page):
  return re.findall(r"```(?:bash|console|sh)\n(.*?)```", read(page), flags=re.DOTALL)


def commands():
  """Returns each command, as words, with its page."""
  found = []
  for page in PAGES:
    for block in blocks(page):
      for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r" > \S+", "", line)
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
          if set(word) <= set("&|;"):
            found += [(page, words)] if words else []
            words = []
          else:
            words.append(word)
  return found


COMMANDS = commands()


def is_module(words):
  return words[0] in PYTHON and words[1] == "-m"


def own_programs():
  """Returns the programs of this repository and their flags, each once."""
  own = {
    tuple(words[2:])
    for _, words in COMMANDS
    if is_module(words) and words[2].partition(".")[0] in ("experiments", "benchmarks")
  }
  return sorted(own)


@pytest.fixture
def smoke(run_program, tmp_path):
  """Runs a program in a folder of its own, up to where it would begin to compute."""
  return lambda words, status: run_program(
    ["tests.docs.smoke", str(tmp_path), *words], status=status
  )


@pytest.mark.parametrize(
  "words", own_programs(), ids=lambda words: " ".join(words)[:60]
)
def test_our_programs_take_the_flags(words, smoke, tmp_path):
  smoke(words, status=0)
  # Nothing was computed, so nothing was written.
  assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
  "words",
  [
    ["experiments.train", "--workdir=runs/x", "--config.depht=3"],
    ["experiments.depth_study", "--workdir=x", "--config.wide_resnet.depth=22"],
    ["experiments.pages", "--chekc"],
  ],
)
def test_the_smoke_mode_finds_what_is_wrong(words, smoke):
  assert smoke(words, status=1).stderr.startswith("error: ")


def test_modules_and_files_of_the_other_commands_exist():
  assert len(own_programs()) > 15
  for page, words in COMMANDS:
    paths = [word for word in words if word.startswith(("launch/", "tests"))]
    assert all((ROOT / path).exists() for path in paths), (page, words)
    if is_module(words):
      module = words[2]
      own = (ROOT / f"{module.replace('.', '/')}.py").exists()
      # The reader's own one is on the page.
      known = own or module in ("venv", "pip") or f"{module}.py" in read(page)
      assert known, (page, words)


def test_blocks_are_shell():
  text = "\n".join(block for page in PAGES for block in blocks(page))
  subprocess.run(["bash", "-n"], input=text, text=True, check=True)
