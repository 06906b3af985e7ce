"""Programs of their own, and the two kinds of databases that hold studies."""

import contextlib
import getpass
import itertools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest

from skipinit_jax.studies.storage import default_url


class Command:
  """A program with its process group, and what it prints.

  Attributes:
    process: the command's own process.
  """

  def __init__(self, arguments: list[str], output: pathlib.Path, env: dict[str, str]):
    self._output = output
    with output.open("wb") as file:
      self.process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=pathlib.Path(__file__).parents[2],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )

  @property
  def output(self) -> str:
    """What it and its workers have printed so far."""
    return self._output.read_text()

  def workers(self) -> list[int]:
    """The processes that it started to train."""
    # Not the tracker process that multiprocessing starts first.
    found = children(self.process.pid)
    return [pid for pid in found if b"spawn_main" in command_line(pid)]

  def signal_group(self, number: int) -> None:
    """Sends a signal to it and its workers, as a terminal or a batch system does."""
    os.killpg(self.process.pid, number)

  def wait(self, timeout: float = 120) -> int:
    """Waits for its end and returns its exit status."""
    try:
      return self.process.wait(timeout)
    except subprocess.TimeoutExpired:
      pytest.fail(f"The command does not end:\n{self.output}")


def children(pid: int) -> list[int]:
  """Returns the processes that a process has started and that have not ended."""
  found: list[int] = []
  for task in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
    with contextlib.suppress(FileNotFoundError):
      found += map(int, task.read_text().split())
  return found


def command_line(pid: int) -> bytes:
  """Returns the command line of a process; of one that has ended it is empty."""
  try:
    return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
  except (FileNotFoundError, ProcessLookupError):
    return b""


@pytest.fixture
def start_command(tmp_path, child_environment) -> Iterator[Callable[..., Command]]:
  """Starts `python -m MODULE FLAGS...` as a process group, which ends with the test."""
  commands: list[Command] = []

  def start(*arguments: str) -> Command:
    output = tmp_path / f"output_{len(commands)}"
    commands.append(Command(list(arguments), output, child_environment()))
    return commands[-1]

  yield start
  for command in commands:
    with contextlib.suppress(ProcessLookupError):
      command.signal_group(signal.SIGKILL)
    command.process.wait()


class Server:
  """A PostgreSQL server of its own.

  Attributes:
    url: its URL, which lacks the database's name.
  """

  def __init__(self, program: str, directory: pathlib.Path):
    """Starts it, with its files in an empty directory."""
    self._program, self._directory = program, directory
    # PostgreSQL refuses to run as root.
    self._user = "postgres" if os.geteuid() == 0 else getpass.getuser()
    shutil.chown(directory, self._user)
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      self._port = probe.getsockname()[1]
    self.url = f"postgresql+psycopg://{self._user}:secret@127.0.0.1:{self._port}"
    self.control("initdb", "--options=--auth=trust --no-sync")
    self.start()

  def control(self, action: str, *options: str) -> None:
    subprocess.run(
      [self._program, action, f"--pgdata={self._directory / 'data'}", *options],
      user=self._user if os.geteuid() == 0 else None,
      cwd=self._directory,
      check=True,
      stdout=subprocess.DEVNULL,
    )

  def start(self) -> None:
    """Starts it; after `kill` as soon as its processes have ended."""
    options = f"-p {self._port} -h 127.0.0.1 -k '' -c fsync=off"
    options += " -c full_page_writes=off"
    log = f"--log={self._directory / 'log'}"
    deadline = time.monotonic() + 60
    while True:
      try:
        return self.control("start", "--wait", log, f"--options={options}")
      except subprocess.CalledProcessError:
        if time.monotonic() > deadline:
          raise
        time.sleep(0.2)

  def kill(self) -> None:
    """Kills it as a lack of memory does, until no process of it serves anyone."""
    pid = int((self._directory / "data/postmaster.pid").read_text().split()[0])
    serving = children(pid)
    os.kill(pid, signal.SIGKILL)
    while any(map(command_line, serving)):
      time.sleep(0.02)


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[Server]:
  """Runs a PostgreSQL server."""
  programs = sorted(
    pathlib.Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"),
    key=lambda path: float(path.parts[4]),
  )
  program = programs[-1] if programs else shutil.which("pg_ctl")
  if program is None:
    pytest.skip("no PostgreSQL server is installed (Debian's package: postgresql)")
  # Not in pytest's own folder, which other users may not enter.
  directory = pathlib.Path(tempfile.mkdtemp(prefix="skipinit_postgresql_"))
  try:
    server = Server(str(program), directory)
    yield server
    # Which does not wait for those still connected.
    server.control("stop", "--mode=fast")
  finally:
    shutil.rmtree(directory, ignore_errors=True)


_NUMBERS = itertools.count()


@pytest.fixture
def postgresql_url(postgresql_server) -> str:
  """The URL of a fresh database on a real server."""
  import psycopg

  name = f"study_{next(_NUMBERS)}"
  server = postgresql_server.url.replace("+psycopg", "")
  with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
    connection.execute(f"CREATE DATABASE {name}")
  return f"{postgresql_server.url}/{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def storage_url(request, tmp_path) -> str:
  """The URL of a fresh database, of each kind."""
  if request.param == "postgresql":
    return request.getfixturevalue("postgresql_url")
  return default_url(tmp_path)
