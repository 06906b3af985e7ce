"""Breaks runs and studies at random, and compares what becomes of them.

Each turn takes a small run or study, new, half done or finished, and one fault: a kill,
a signal, damaged bytes, wrong values in JSON or in the database, errors of reading, or
an odd environment. It survives if the command says in one sentence why it does not go
on, or goes on; and if the same command, once the fault is gone, ends as if nothing had
been: with the same metrics and parameters, bit by bit. Where a file lost something for
good, the command must have said so.

Example:
  python -m benchmarks.storm --seconds=600 --seed=0 > results/storm/storm.json
"""

import atexit
import builtins
import collections
import contextlib
import dataclasses
import errno
import hashlib
import importlib
import io
import json
import os
import pathlib
import random
import resource
import runpy
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from benchmarks import benchmark
from skipinit_jax.cores import num_cores

_SECONDS = flags.DEFINE_float("seconds", 600.0, "How long it blows.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of all faults.", lower_bound=0)
_OF = flags.DEFINE_multi_enum("of", ["run", "study"], ["run", "study"], "What breaks.")

# A command that takes longer hangs.
_DEADLINE = 120.0
_NETWORK = {"model": "residual_mlp", "depth": 2, "width": 8, "epochs": 6}
_RUN = ["experiments.train", "--config.checkpoint_every_seconds=0"]
_RUN += ["--config.signal_every_steps=50"]
_RUN += [f"--config.{name}={value}" for name, value in _NETWORK.items()]
_STUDY = ["experiments.regularization_study", "--workers=1"]
_STUDY += ["--config.methods=('skipinit',)", "--config.dropout_rates=(0.5,)"]
_STUDY += ["--config.use_bias=(True,)", "--config.search.learning_rates=(0.125,)"]
_STUDY += ["--config.search.extend=False", "--config.search.num_seeds=1"]
_STUDY += ["--config.search.best_of=1"]
_STUDY += [f"--config.train.{name}={value}" for name, value in _NETWORK.items()]
_COMMANDS = {"run": _RUN, "study": _STUDY}
# What commands import. None starts a thread, which no fork would survive.
_IMPORTED = ["optuna", "matplotlib.pyplot", "orbax.checkpoint", "tensorboardX"]
_IMPORTED += ["skipinit_jax.studies", "skipinit_jax.training", "ml_collections"]
_VALUES: list[Any] = [None, True, -1, 0.5, 2**40, "", "x", "NaN", [], {}, [1], {"a": 1}]

Prepare = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a command ended, and what it printed."""

  status: int
  text: str

  def fault(self, statuses: Sequence[int] = ()) -> str | None:
    """Returns what is wrong: neither one of the statuses nor a sentence."""
    sentences = sum(line.startswith("error: ") for line in self.text.splitlines())
    refused = self.status == 1 and sentences == 1
    if "Traceback" in self.text or not (self.status in statuses or refused):
      return f"status {self.status}: {self.text[-2000:]}"
    return None


def _start(command: Sequence[str], folder: pathlib.Path, prepare: Prepare) -> int:
  """Forks a command that has imported what it needs; returns its process."""
  process = os.fork()
  if process:
    return process
  for stream in (1, 2):
    os.dup2(os.open(f"{folder}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
  signal.alarm(int(_DEADLINE))
  sys.argv = [*command, f"--workdir={folder}"]
  status: Any = 0
  try:
    prepare()
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
  except SystemExit as end:
    status = end.code
  except BaseException:
    traceback.print_exc()
    status = 1
  # An ordinary end would unwind the stack of the process that was forked.
  threading._shutdown()  # type: ignore[attr-defined]
  atexit._run_exitfuncs()
  sys.stdout.flush()
  os._exit(status or 0)


def _wait(process: int, folder: pathlib.Path) -> Ended:
  _, status = os.waitpid(process, 0)
  output = pathlib.Path(f"{folder}.out")
  text = output.read_text("utf-8", "replace") if output.exists() else ""
  output.unlink(missing_ok=True)
  return Ended(os.waitstatus_to_exitcode(status), text)


def _fork(work: Callable[[], Any]) -> Any:
  """Returns what some work returns as JSON, done in a fork."""
  read, write = os.pipe()
  if os.fork() == 0:
    os.write(write, json.dumps(work()).encode())
    os._exit(0)
  os.close(write)
  with open(read, "rb") as file:
    content = file.read()
  os.wait()
  return json.loads(content or b"null")


def _fingerprint(folder: pathlib.Path) -> Any:
  """Returns what has to be equal: of a study its runs, of a run metrics and bits."""
  results = folder / "results.json"
  if results.exists():
    names = ("search", "learning_rate", "seed", "train_loss", "test_loss")
    runs = json.loads(results.read_bytes())["runs"]
    return sorted([run[name] for name in names] for run in runs)
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]

  def digest() -> str:
    import jax
    from absl import logging

    from skipinit_jax.training import load_trained

    logging.set_verbosity(logging.WARNING)
    leaves = jax.tree.leaves(load_trained(folder).variables)
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()

  return [*({**row, "images_per_second": 0} for row in rows), _fork(digest)]


class Turn:
  """One fault of a run or a study."""

  def __init__(self, rng: random.Random, lane: pathlib.Path, what: str) -> None:
    self.rng = rng
    self.command, self.whole = _COMMANDS[what], lane.parent / what
    self.folder = lane / "work"
    shutil.rmtree(lane, ignore_errors=True)
    lane.mkdir()
    self.done = rng.choice(["new", "half", "finished"])
    if self.done != "new":
      shutil.copytree(self.whole, self.folder)
    if self.done == "half":
      # As a command that was killed before its last steps has left it.
      for name in ("results.json", "result.json", "study.db"):
        (self.folder / name).unlink(missing_ok=True)
      for result in [*self.folder.glob("trials/**/result.json")][:1]:
        result.unlink()
      steps = [*self.folder.glob("checkpoints/*")]
      shutil.rmtree(max(steps, key=lambda path: int(path.name))) if steps else None

  def start(self, prepare: Prepare = lambda: None) -> Ended:
    """Runs the command to its end."""
    return _wait(_start(self.command, self.folder, prepare), self.folder)

  def ends_equal(self) -> str | None:
    """Runs the command without any fault; returns what differs from an undisturbed."""
    ended = self.start()
    if ended.status or "Traceback" in ended.text:
      return f"afterwards, status {ended.status}: {ended.text[-2000:]}"
    same = _fingerprint(self.folder) == _fingerprint(self.whole)
    return None if same else f"it differs from an undisturbed one: {ended.text}"

  def killed(self) -> str | None:
    """SIGKILL at any moment."""
    process = _start(self.command, self.folder, lambda: None)
    time.sleep(self.rng.uniform(0, 5))
    os.kill(process, signal.SIGKILL)
    _wait(process, self.folder)
    return self.ends_equal()

  def signalled(self) -> str | None:
    """SIGTERM, or SIGINT once or twice, at any moment."""
    number = self.rng.choice([signal.SIGTERM, signal.SIGINT])
    process = _start(self.command, self.folder, lambda: None)
    # A fork has Python's own handlers until its program sets others.
    time.sleep(self.rng.uniform(1, 5))
    for _ in range(self.rng.choice([1, 2])):
      os.kill(process, number)
      time.sleep(self.rng.uniform(0, 0.2))
    return _wait(process, self.folder).fault([0, 4, 130]) or self.ends_equal()

  def signalled_at_start(self) -> str | None:
    """A signal while Python starts; only one before its first line may kill."""
    number = self.rng.choice([signal.SIGTERM, signal.SIGINT])
    command = [sys.executable, "-m", *self.command, f"--workdir={self.folder}"]
    with open(f"{self.folder}.out", "w") as out:
      process = subprocess.Popen(command, stdout=out, stderr=out)
    time.sleep(self.rng.uniform(0.3, 4))
    process.send_signal(number)
    status = process.wait(_DEADLINE)
    text = pathlib.Path(f"{self.folder}.out").read_text()
    statuses = [0, 4, 130] if text else [0, 4, 130, -number]
    return Ended(status, text).fault(statuses) or self.ends_equal()

  def _file(self) -> pathlib.Path:
    """Returns a file of a workdir that has some."""
    if self.done == "new":
      shutil.copytree(self.whole, self.folder)
    files = [path for path in self.folder.rglob("*") if path.is_file()]
    folders = {path.parent for path in files}
    folder = self.rng.choice(sorted(folders))
    return self.rng.choice(sorted(path for path in files if path.parent == folder))

  def _damaged(self, file: pathlib.Path, exact: bool) -> str | None:
    """Runs the command on a damaged file; then with the file as it was."""
    saved = self.folder.parent / "saved"
    before = {path for path in self.folder.rglob("*") if path.is_file()}
    ended = self.start()
    if fault := ended.fault([0]):
      return fault
    if ended.status == 0:
      said = not exact or "lost" in ended.text or "lacks" in ended.text
      same = said or _fingerprint(self.folder) == _fingerprint(self.whole)
      return None if same else f"it differs, and does not say so: {ended.text}"
    if gone := before - {*self.folder.rglob("*")}:
      return f"{gone} went: {ended.text}"
    shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
    shutil.copy2(saved, file)
    return self.ends_equal()

  def damaged_bytes(self) -> str | None:
    """A file is cut, flipped, zeroed, emptied, longer, a folder or not there."""
    file, rng = self._file(), self.rng
    shutil.copy2(file, self.folder.parent / "saved")
    content = bytearray(file.read_bytes())
    action = rng.choice(["cut", "flip", "zero", "empty", "grow", "folder", "remove"])
    place = rng.randrange(len(content) + 1)
    if action == "cut":
      del content[place:]
    elif action == "flip" and content:
      content[place - 1] ^= 1 << rng.randrange(8)
    elif action == "zero":
      content[place : place + 512] = bytes(min(512, len(content) - place))
    elif action == "empty":
      content.clear()
    elif action == "grow":
      content += rng.randbytes(100)
    file.unlink()
    if action == "folder":
      file.mkdir()
    elif action != "remove":
      file.write_bytes(content)
    # Another digit is no damage that anyone could see, but in a checkpoint.
    plain = (
      file.suffix in (".json", ".jsonl", ".db") and "checkpoints" not in file.parts
    )
    return self._damaged(file, exact=not (plain and action == "flip"))

  def wrong_values(self) -> str | None:
    """Valid JSON, or a row of the database, of other values."""
    rng = self.rng
    if self.done == "new":
      shutil.copytree(self.whole, self.folder)
    files = [*self.folder.rglob("*.json"), *self.folder.rglob("*.jsonl")]
    files = sorted(file for file in files if "checkpoints" not in file.parts)
    file = rng.choice([*files, *[*self.folder.glob("study.db")] * 3])
    shutil.copy2(file, self.folder.parent / "saved")
    if file.suffix == ".db":
      _change_database(file, rng)
    else:
      text = file.read_text().rstrip()
      lines = text.split("\n") if file.suffix == ".jsonl" else [text]
      value = json.loads(lines[-1])
      parent = value
      while isinstance(parent, dict) and parent:
        key = rng.choice([*parent])
        if not isinstance(parent[key], dict) or rng.random() < 0.3:
          parent[key] = rng.choice(_VALUES)
          break
        parent = parent[key]
      file.write_text("\n".join([*lines[:-1], json.dumps(value), ""]))
    return self._damaged(file, exact=False)

  def unreadable(self) -> str | None:
    """The system refuses to read a file: nothing may be called damaged or removed."""
    file = self._file()
    number = self.rng.choice([errno.EIO, errno.EACCES])
    shutil.copy2(file, self.folder.parent / "saved")
    real = io.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
      if isinstance(path, str | os.PathLike) and os.fspath(path) == os.fspath(file):
        raise OSError(number, os.strerror(number), os.fspath(path))
      return real(path, *args, **kwargs)

    def prepare() -> None:
      io.open = builtins.open = refuse  # type: ignore[assignment]

    before = {path for path in self.folder.rglob("*") if path.is_file()}
    ended = self.start(prepare)
    if fault := ended.fault([0]):
      return fault
    if ended.status and ("damaged" in ended.text or not file.exists()):
      return f"it is called damaged or removed: {ended.text}"
    if ended.status and (gone := before - {*self.folder.rglob("*")}):
      return f"{gone} went: {ended.text}"
    return self.ends_equal()

  def odd_environment(self) -> str | None:
    """Streams that are closed or full, no home, little space, names that cannot be."""
    name = self.rng.choice([*_ENVIRONMENTS])
    fault = self.start(_ENVIRONMENTS[name]).fault([0])
    return f"{name}: {fault}" if fault else self.ends_equal()


def _change_database(file: pathlib.Path, rng: random.Random) -> None:
  with contextlib.closing(sqlite3.connect(file)) as database:
    query = "SELECT name FROM sqlite_master WHERE type = 'table'"
    tables = sorted(name for (name,) in database.execute(query))
    table = rng.choice(tables + ["trial_user_attributes"] * 5 + ["trials"] * 3)
    columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
    new = rng.choice([None, -1, 1.5, "", "x", "[", "null", b"\xff", "1e999"])
    changes = [f"UPDATE {table} SET {rng.choice(columns)} = ?", f"DELETE FROM {table}"]
    change = rng.choice(changes)
    with contextlib.suppress(sqlite3.IntegrityError):
      database.execute(change, [new] if "?" in change else [])
    database.commit()


def _without_home() -> None:
  os.environ.pop("XDG_CACHE_HOME", None)
  os.path.expanduser = lambda path: path


def _pipe_without_reader() -> None:
  read, write = os.pipe()
  os.close(read)
  os.dup2(write, 1)
  os.dup2(write, 2)


def _little_space() -> None:
  resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))


def _cache_is_a_file() -> None:
  os.environ["XDG_CACHE_HOME"] = __file__


def _change_flag(value: bytes) -> Prepare:
  return lambda: sys.argv.append(f"--workdir={os.fsdecode(value)}")


def _removed_directory() -> None:
  os.chdir(tempfile.mkdtemp())
  os.rmdir(os.getcwd())
  sys.argv.append("--workdir=relative")


_ENVIRONMENTS: dict[str, Prepare] = {
  "standard error closed": lambda: os.close(2),
  "standard output closed": lambda: os.close(1),
  "standard output full": lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1),
  "nobody reads": _pipe_without_reader,
  "no home": _without_home,
  "little space": _little_space,
  "a file for the cache folder": _cache_is_a_file,
  "a name that is not UTF-8": _change_flag(b"/tmp/\xff"),
  "a name that is too long": _change_flag(b"/tmp/" + b"x" * 300),
  "a removed directory": _removed_directory,
}
_KINDS: dict[str, Callable[[Turn], str | None]] = {
  "killed": Turn.killed,
  "asked to stop": Turn.signalled,
  "asked to stop while Python starts": Turn.signalled_at_start,
  "damaged bytes": Turn.damaged_bytes,
  "wrong values": Turn.wrong_values,
  "errors of reading": Turn.unreadable,
  "odd environment": Turn.odd_environment,
}


def blow(
  place: pathlib.Path, seconds: float, seed: int, of: Sequence[str]
) -> list[tuple[str, str, bool]]:
  """Returns what was broken, how, and whether it survived, in the order of turns.

  Args:
    place: an empty folder.
    seconds: how long turns start.
    seed: of all faults; the moments of signals differ.
    of: "run", "study" or both.
  """
  for name in _IMPORTED:
    importlib.import_module(name)
  os.environ["XDG_CACHE_HOME"] = str(place / "cache")
  for name in of:
    ended = _wait(_start(_COMMANDS[name], place / name, lambda: None), place / name)
    if ended.status:
      raise RuntimeError(f"An undisturbed {name} failed: {ended.text}")
  deadline = time.monotonic() + seconds
  lanes = []
  for number in range(num_cores()):
    read, write = os.pipe()
    if os.fork() == 0:
      rng, outcomes = random.Random(f"{seed} {number}"), []
      while time.monotonic() < deadline:
        what, kind = rng.choice(of), rng.choice([*_KINDS])
        turn = Turn(rng, place / f"lane{number}", what)
        why = _KINDS[kind](turn)
        outcomes.append((what, kind, why is None))
        if why is not None:
          print(f"A {what}, {turn.done}, {kind}: {why}\n", file=sys.stderr, flush=True)
      os.write(write, json.dumps(outcomes).encode())
      os._exit(0)
    os.close(write)
    lanes.append(read)
  found = []
  for read in lanes:
    with open(read, "rb") as file:
      found += json.loads(file.read() or b"[]")
    os.wait()
  return [tuple(each) for each in found]


def measure() -> dict[str, Any]:
  """Returns the figures by kind of fault."""
  # A `TemporaryDirectory` would go with the first fork that ends.
  place = tempfile.mkdtemp()
  try:
    outcomes = blow(pathlib.Path(place), _SECONDS.value, _SEED.value, _OF.value)
  finally:
    shutil.rmtree(place)
  tried = collections.Counter((what, kind) for what, kind, _ in outcomes)
  survived = collections.Counter((what, kind) for what, kind, well in outcomes if well)
  rows = [
    {
      "fault": kind,
      "of a": what,
      "tried": tried[what, kind],
      "survived": survived[what, kind],
      "failed": tried[what, kind] - survived[what, kind],
    }
    for kind in _KINDS
    for what in _OF.value
  ]
  return {
    "seconds": _SECONDS.value,
    "seed": _SEED.value,
    "tables": {"what_survives": rows},
  }


if __name__ == "__main__":
  benchmark.run(measure)
