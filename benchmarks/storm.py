"""Breaks runs and studies at random, and compares what becomes of them.

Each turn takes a small run or study, new, half done or finished, and one fault. It
survives if the command says in one sentence why it does not go on, or goes on; and if
the same command, once the fault is gone, ends as if nothing had been: with the same
metrics and parameters, bit by bit. Where a file lost something for good, the command
must have said so.

Example:
  python -m benchmarks.storm --seconds=600 --seed=0 > results/storm/storm.json
"""

import collections
import concurrent.futures
import contextlib
import errno
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags, logging

from benchmarks import benchmark
from skipinit_jax.cores import num_cores
from skipinit_jax.training import load_trained

_SECONDS = flags.DEFINE_float("seconds", 600.0, "How long turns start.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all faults.", lower_bound=0)
_OF = flags.DEFINE_multi_enum("of", ["run", "study"], ["run", "study"], "What breaks.")

# A command that takes longer hangs.
_DEADLINE = 150.0
_FIELDS = ("model=residual_mlp", "depth=2", "width=8", "epochs=6")
_COMMANDS = {
  "run": [
    "experiments.train",
    *(f"--config.{field}" for field in _FIELDS),
    "--config.checkpoint_every_seconds=0",
    "--config.signal_every_steps=50",
  ],
  "study": [
    "experiments.regularization_study",
    *(f"--config.train.{field}" for field in _FIELDS),
    "--workers=1",
    "--config.methods=('skipinit',)",
    "--config.dropout_rates=(0.5,)",
    "--config.use_bias=(True,)",
    "--config.search.learning_rates=(0.125,)",
    "--config.search.extend=False",
    "--config.search.num_seeds=1",
    "--config.search.best_of=1",
  ],
}
_VALUES: tuple[Any, ...] = (
  None,
  True,
  -1,
  0.5,
  2**40,
  "",
  "x",
  "NaN",
  [],
  {},
  [1],
  {"a": 1},
)
_SQL_VALUES = (None, -1, 1.5, "", "x", "[", "null", b"\xff", "1e999")
# Runs a module as `python -m` does, after something else.
_AFTER = "import runpy, sys\nrunpy.run_module(sys.argv[1], run_name='__main__')"
# The system reads all files but one.
_REFUSED = """
import builtins, io, os, sys
def refuse(path, *args, real=open, **kwargs):
  if isinstance(path, (str, os.PathLike)) and os.fspath(path) == {path!r}:
    raise OSError({number}, os.strerror({number}), {path!r})
  return real(path, *args, **kwargs)
io.open = builtins.open = refuse
"""
_NO_HOME = "import os\nos.environ.pop('XDG_CACHE_HOME')\nos.path.expanduser = str\n"


def _unread_pipe() -> None:
  read, write = os.pipe()
  os.close(read)
  os.dup2(write, 1)
  os.dup2(write, 2)


def _leave_directory() -> None:
  os.chdir(tempfile.mkdtemp())
  os.rmdir(os.getcwd())


# How a command is started: see `Turn.start`.
_ENVIRONMENTS: dict[str, dict[str, Any]] = {
  "standard error closed": {"prepare": lambda: os.close(2)},
  "standard output closed": {"prepare": lambda: os.close(1)},
  "output full": {"prepare": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1)},
  "nobody reads": {"prepare": _unread_pipe},
  "little space": {
    "prepare": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
  },
  "no home": {"before": _NO_HOME},
  "a file as cache folder": {"environment": {"XDG_CACHE_HOME": __file__}},
  "an unknown platform": {"environment": {"JAX_PLATFORMS": "abacus"}},
  "a name that is not UTF-8": {"workdir": os.fsdecode(b"/tmp/\xff")},
  "a name that is too long": {"workdir": "/tmp/" + "x" * 300},
  "a removed directory": {"workdir": "relative", "prepare": _leave_directory},
}


class Ended(NamedTuple):
  """How a command ended, and what it printed."""

  status: int
  text: str

  def fault(self, statuses: Sequence[int] = (0,)) -> str | None:
    """Returns what is wrong: it is neither one of the statuses nor one sentence."""
    sentences = sum(line.startswith("error: ") for line in self.text.splitlines())
    refused = self.status == 1 and sentences == 1
    if "Traceback" in self.text or not (self.status in statuses or refused):
      return f"status {self.status}: {self.text[-2000:]}"
    return None


def fingerprint(folder: pathlib.Path) -> Any:
  """Returns what has to be equal: of a study its runs, of a run metrics and bits."""
  results = folder / "results.json"
  if results.exists():
    names = ("search", "learning_rate", "seed", "train_loss", "test_loss")
    runs = json.loads(results.read_bytes())["runs"]
    return sorted([run[name] for name in names] for run in runs)
  rows = map(json.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
  leaves = jax.tree.leaves(load_trained(folder).variables)
  bits = [leaf.tobytes() for leaf in leaves]
  return [{**row, "images_per_second": 0} for row in rows], bits


class Turn:
  """One fault of one run or study; each method breaks it in a way of its own.

  A method returns what went wrong, or None.
  """

  def __init__(
    self,
    rng: random.Random,
    place: pathlib.Path,
    lane: int,
    what: str,
    new: bool = False,
  ) -> None:
    self.rng, self.whole = rng, place / what
    self.folder, self.saved = place / f"work{lane}", place / f"saved{lane}"
    self.module, *self.flags = _COMMANDS[what]
    self.environment = os.environ | {"XDG_CACHE_HOME": str(place / "cache")}
    shutil.rmtree(self.folder, ignore_errors=True)
    if not new and rng.random() < 0.7:
      self._copy()

  def _copy(self) -> None:
    """Takes the finished one, or what a kill before its last steps has left of it."""
    shutil.copytree(self.whole, self.folder, dirs_exist_ok=True)
    if self.rng.random() < 0.5:
      return
    for name in ("results.json", "result.json", "study.db"):
      (self.folder / name).unlink(missing_ok=True)
    for result in [*self.folder.glob("trials/**/result.json")][:1]:
      result.unlink()
    for newest in sorted(self.folder.glob("checkpoints/*"))[-1:]:
      shutil.rmtree(newest)

  def start(
    self,
    signals: Sequence[tuple[float, int]] = (),
    *,
    prepare: Callable[[], Any] | None = None,
    before: str = "",
    environment: dict[str, str] | None = None,
    workdir: str | None = None,
  ) -> Ended:
    """Runs the command to its end.

    Args:
      signals: seconds to wait, and what to send then, one after the other.
      prepare: called in the new process.
      before: Python that goes before the program.
      environment: variables to change.
      workdir: another one.
    """
    how = ["-c", before + _AFTER] if before else ["-m"]
    flags = [*self.flags, f"--workdir={workdir or self.folder}"]
    with tempfile.TemporaryFile("w+", errors="replace") as output:
      process = subprocess.Popen(
        [sys.executable, *how, self.module, *flags],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=self.environment | (environment or {}),
        preexec_fn=prepare,
      )
      for seconds, number in signals:
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(seconds)
        process.send_signal(number)
      try:
        status = process.wait(_DEADLINE)
      except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
      output.seek(0)
      return Ended(status, output.read())

  def ends_equal(self) -> str | None:
    """Runs the command without any fault, and compares."""
    ended = self.start()
    if ended.status or "Traceback" in ended.text:
      return f"afterwards, status {ended.status}: {ended.text[-2000:]}"
    if fingerprint(self.folder) != fingerprint(self.whole):
      return f"it differs from an undisturbed one: {ended.text}"
    return None

  def killed(self) -> str | None:
    """SIGKILL at any moment, also while Python starts."""
    self.start([(self.rng.uniform(0, 8), signal.SIGKILL)])
    return self.ends_equal()

  def asked_to_stop(self) -> str | None:
    """SIGTERM, or SIGINT once or twice, at any moment."""
    number = self.rng.choice([signal.SIGTERM, signal.SIGINT])
    moments = [self.rng.uniform(0.3, 8), self.rng.uniform(0, 0.5)]
    sent = [(moment, number) for moment in moments[: self.rng.choice([1, 1, 2])]]
    ended = self.start(sent)
    # Nothing catches a signal before Python comes to the program's first line.
    early = [] if ended.text else [-number]
    return ended.fault([0, 4, 130, *early]) or self.ends_equal()

  def _damaged(self, file: pathlib.Path, exact: bool) -> str | None:
    """Runs the command with a damaged file; where it refuses, then with the intact."""
    before = {path for path in self.folder.rglob("*") if path.is_file()}
    ended = self.start()
    if fault := ended.fault():
      return fault
    if "checkpoints" in file.parts and ended.status == 0:
      # A finished run has not looked.
      (self.folder / "result.json").unlink(missing_ok=True)
      return self.ends_equal()
    if ended.status == 0:
      said = not exact or "lost" in ended.text
      same = said or fingerprint(self.folder) == fingerprint(self.whole)
      return None if same else f"it differs, and does not say so: {ended.text}"
    if gone := before - {*self.folder.rglob("*")}:
      return f"{gone} went: {ended.text}"
    shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    shutil.copy2(self.saved, file)
    return self.ends_equal()

  def _file(self, *patterns: str) -> pathlib.Path:
    """Returns a file of the workdir, of which there is a copy."""
    if not self.folder.exists():
      self._copy()
    found = {path for pattern in patterns for path in self.folder.rglob(pattern)}
    files = sorted(path for path in found if path.is_file())
    # A checkpoint has many.
    parent = self.rng.choice(sorted({path.parent for path in files}))
    file = self.rng.choice([path for path in files if path.parent == parent])
    shutil.copy2(file, self.saved)
    return file

  def damaged_bytes(self) -> str | None:
    """A file is cut, longer, empty, of other bytes, a folder, or gone."""
    file, rng = self._file("*"), self.rng
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content) + 1)
    action = rng.choice(["cut", "flip", "zero", "empty", "grow", "folder", "remove"])
    if action == "cut":
      del content[place:]
    elif action == "flip" and content:
      content[place - 1] ^= 1 << rng.randrange(8)
    elif action == "zero":
      content[place : place + 512] = bytes(len(content[place : place + 512]))
    elif action == "empty":
      content.clear()
    elif action == "grow":
      content += rng.randbytes(100)
    file.unlink()
    if action == "folder":
      file.mkdir()
    elif action != "remove":
      file.write_bytes(content)
    # Nobody can see that a digit is another, but in a checkpoint.
    plain = file.suffix in (".json", ".jsonl", ".db")
    return self._damaged(file, exact=action != "flip" or not plain)

  def wrong_values(self) -> str | None:
    """JSON that is valid, or a row of the database, has other values."""
    rng = self.rng
    file = self._file("config.json", "record.json", "result*.json", "*.jsonl", "*.db")
    if file.suffix == ".db":
      with contextlib.closing(sqlite3.connect(file)) as database:
        query = "SELECT name FROM sqlite_master WHERE type = 'table'"
        tables = sorted(name for (name,) in database.execute(query))
        table = rng.choice(tables + ["trial_user_attributes"] * 5 + ["trials"] * 3)
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        update = f"UPDATE {table} SET {rng.choice(columns)} = ?"
        with contextlib.suppress(sqlite3.IntegrityError):
          if rng.random() < 0.7:
            database.execute(update, [rng.choice(_SQL_VALUES)])
          else:
            database.execute(f"DELETE FROM {table}")
        database.commit()
      return self._damaged(file, exact=False)
    text = file.read_text().rstrip()
    lines = text.split("\n") if file.suffix == ".jsonl" else [text]
    value = parent = json.loads(lines[-1])
    while isinstance(parent, dict) and parent:
      key = rng.choice([*parent])
      if not isinstance(parent[key], dict) or rng.random() < 0.3:
        parent[key] = rng.choice(_VALUES)
        break
      parent = parent[key]
    file.write_text("\n".join([*lines[:-1], json.dumps(value), ""]))
    return self._damaged(file, exact=False)

  def errors_of_reading(self) -> str | None:
    """The system does not read a file: that is no damage."""
    file = self._file("*")
    number = self.rng.choice([errno.EIO, errno.EACCES])
    before = {path for path in self.folder.rglob("*") if path.is_file()}
    ended = self.start(before=_REFUSED.format(path=str(file), number=number))
    if fault := ended.fault():
      return fault
    if ended.status and ("damaged" in ended.text or before - {*self.folder.rglob("*")}):
      return f"it counts as damaged, or something went: {ended.text}"
    return self.ends_equal()

  def odd_environment(self) -> str | None:
    """Streams, folders, variables and names that are not as usual."""
    name = self.rng.choice([*_ENVIRONMENTS])
    fault = self.start(**_ENVIRONMENTS[name]).fault()
    return f"{name}: {fault}" if fault else self.ends_equal()


_KINDS: tuple[Callable[[Turn], str | None], ...] = (
  Turn.killed,
  Turn.asked_to_stop,
  Turn.damaged_bytes,
  Turn.wrong_values,
  Turn.errors_of_reading,
  Turn.odd_environment,
)


def blow(
  place: pathlib.Path, seconds: float, seed: int, of: Sequence[str]
) -> list[tuple[str, str, bool]]:
  """Returns what was broken, how, and whether it survived.

  Args:
    place: an empty folder.
    seconds: how long turns start.
    seed: of all faults; the moments of signals differ.
    of: "run", "study" or both.
  """
  logging.set_verbosity(logging.ERROR)
  warnings.filterwarnings("ignore", ".*fork", RuntimeWarning)
  for what in of:
    turn = Turn(random.Random(0), place, 0, what, new=True)
    turn.folder = turn.whole
    ended = turn.start()
    if ended.status:
      raise RuntimeError(f"An undisturbed {what} failed: {ended.text}")
  deadline = time.monotonic() + seconds

  def blow_in(lane: int) -> list[tuple[str, str, bool]]:
    rng, outcomes = random.Random(f"{seed} {lane}"), []
    while time.monotonic() < deadline:
      what, fault = rng.choice(of), rng.choice(_KINDS)
      try:
        why = fault(Turn(rng, place, lane, what))
      except Exception:  # What the command left cannot even be compared.
        why = traceback.format_exc()
      name = fault.__name__.replace("_", " ")
      outcomes.append((what, name, why is None))
      if why is not None:
        print(f"A {what}, {name}: {why}\n", file=sys.stderr, flush=True)
    return outcomes

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return [each for found in pool.map(blow_in, range(num_cores())) for each in found]


def measure() -> dict[str, Any]:
  """Returns the figures by kind of fault."""
  with tempfile.TemporaryDirectory() as place:
    outcomes = blow(pathlib.Path(place), _SECONDS.value, _SEED.value, _OF.value)
  tried = collections.Counter((name, what) for what, name, _ in outcomes)
  survived = collections.Counter((name, what) for what, name, well in outcomes if well)
  rows = [
    {
      "fault": name,
      "of a": what,
      "tried": tried[name, what],
      "survived": survived[name, what],
      "failed": tried[name, what] - survived[name, what],
    }
    for name, what in sorted(tried)
  ]
  return {
    "seconds": _SECONDS.value,
    "seed": _SEED.value,
    "tables": {"what_survives": rows},
  }


if __name__ == "__main__":
  benchmark.run(measure)
