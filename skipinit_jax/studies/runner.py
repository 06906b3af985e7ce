"""Runs the trials of a study until it is finished, side by side or one by one.

Side by side, the command's own process asks the storage what to do and watches. The
training runs are in processes of their own, or, on an accelerator, in threads that each
have some of its devices. Whatever is killed, the same command goes on.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import pathlib
import queue
import signal
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import jax

from skipinit_jax import data
from skipinit_jax.cores import num_cores
from skipinit_jax.document import command_line
from skipinit_jax.errors import UsageError
from skipinit_jax.files import LockedError, local_workdir, lock, make_directory
from skipinit_jax.studies.history import make_history
from skipinit_jax.studies.progress import StudyProgress
from skipinit_jax.studies.results import keep_predictions, write_results
from skipinit_jax.studies.statistics import above_chance, above_share
from skipinit_jax.studies.storage import (
  HEARTBEAT_SECONDS,
  ClaimedTrial,
  Storage,
  StorageLost,
  default_url,
  printable_url,
  run_dir,
)
from skipinit_jax.studies.study import (
  Interrupted,
  Key,
  Run,
  Search,
  Study,
  StudyResults,
  check,
  missing_runs,
  summarize,
)
from skipinit_jax.training import Result, TrainConfig, distributed, train
from skipinit_jax.training.metrics import read_metrics
from skipinit_jax.training.record import jax_settings
from skipinit_jax.training.stop import StopRequest

_POLL_SECONDS = 1.0
_MAX_ATTEMPTS = 3
# For each core.
_MOST_WORKERS = 16
# The processes of a command that was killed save before they end.
_SAVE_SECONDS = 120.0


def run(
  study: Study,
  workdir: str | os.PathLike[str],
  *,
  storage: str | None = None,
  study_name: str | None = None,
  num_workers: int | None = None,
  devices_per_trial: int | None = None,
) -> StudyResults:
  """Runs a study to its end and writes `results.json`.

  The same call goes on with an interrupted study. Calls on other machines with the
  same storage share the work, each with a workdir of its own or a common one.

  Args:
    workdir: directory of the results, of the runs' own directories (under `trials`),
      and of the storage's file unless there is another.
    storage: URL of a database; None: an SQLite file in the workdir.
    study_name: the study's name in the database; None: its kind's.
    num_workers: processes that share the runs. One process runs a trial on each group
      of devices. None: one a core of a CPU, one on an accelerator.
    devices_per_trial: devices of one process that a trial has; None: all of a CPU, one
      of an accelerator.

  Returns:
    The results.

  Raises:
    UsageError: a configuration, the data, the storage or the workdir cannot be used,
      or a trial failed again and again.
    Interrupted: a signal asked to stop, or the database was away for a minute;
      running trials were saved.
  """
  check(study)
  num_workers, devices_per_trial = _resources(num_workers, devices_per_trial)
  threshold = trains_above(study)
  dataset = study.searches[0].config.load_dataset()
  workdir = local_workdir(workdir)
  lock_path = _lock_path(workdir)
  # Without the database's password, however it was given.
  shown = printable_url(storage) if storage else ""
  command = command_line({"--storage": shown, storage or "": shown})
  with contextlib.ExitStack() as stack:

    @stack.push
    def _(error_type: type[BaseException] | None, *_: object) -> None:
      # Trials that run in the eyes of a lost database are known by this file.
      if error_type is not StorageLost:
        lock_path.unlink(missing_ok=True)

    stack.enter_context(lock(lock_path))
    stop = stack.enter_context(StopRequest())
    trials = Storage(
      storage or default_url(workdir),
      study,
      study_name,
      in_workdir=not storage,
      record={"data": dataset.record(), "jax": jax_settings()},
      stopped=lambda: stop.requested,
    )
    workers = _Workers(workdir / "trials", num_workers, devices_per_trial, stop)
    stack.callback(workers.close)
    progress = stack.enter_context(StudyProgress(study, workers.capacity))
    supervisor = _Supervisor(study, trials, threshold, workers, lock_path, progress)
    runs = supervisor.run(stop)
  results = keep_predictions(summarize(study, runs, threshold, command), workdir)
  write_results(results, workdir)
  return results


def _resources(
  num_workers: int | None, devices_per_trial: int | None
) -> tuple[int, int]:
  on_cpu = jax.default_backend() == "cpu"
  if num_workers is None:
    num_workers = num_cores() if on_cpu else 1
  if num_workers < 1:
    raise UsageError(f"--workers is {num_workers}: it must be at least 1.")
  if num_workers > (most := _MOST_WORKERS * num_cores()):
    raise UsageError(f"--workers is {num_workers}: on these cores at most {most}.")
  if num_workers > 1 and not on_cpu:
    raise UsageError(
      f"--workers is {num_workers}: processes cannot share an accelerator, so it must "
      "be 1, which runs a trial on each of its devices."
    )
  num_devices = jax.local_device_count()
  if devices_per_trial is None:
    devices_per_trial = num_devices if on_cpu else 1
  elif num_workers > 1:
    raise UsageError(
      f"--devices_per_trial is {devices_per_trial} and --workers {num_workers}: only "
      "one process shares its devices among trials, so use --workers=1 with it."
    )
  if not 1 <= devices_per_trial <= num_devices or num_devices % devices_per_trial:
    raise UsageError(
      f"--devices_per_trial is {devices_per_trial}: it must divide the {num_devices} "
      "devices."
    )
  return num_workers, devices_per_trial


def trains_above(study: Study) -> float:
  """Returns the test accuracy above which a network of the study counts as trained.

  Raises:
    UsageError: its searches have several data sets, or the data set is not there.
  """
  config = study.searches[0].config
  names = {search.config.dataset for search in study.searches}
  if len(names) > 1:
    raise UsageError(
      f"The study's data sets differ ({', '.join(sorted(names))}): it has one."
    )
  dataset = config.load_dataset()
  if isinstance(dataset, data.StreamedDataset):
    # Their classes are of one size: reading them all would tell nothing more.
    return above_share(1 / dataset.num_classes, dataset.test.num_examples)
  return above_chance(dataset.test.labels)


def _lock_path(workdir: pathlib.Path) -> pathlib.Path:
  path = workdir / "commands" / f"{socket.gethostname()}_{uuid.uuid4().hex[:8]}"
  for directory in (workdir, path.parent):
    make_directory(directory)
  return path


@dataclasses.dataclass
class _Supervisor:
  """Matches the study's missing runs with this machine's free workers."""

  study: Study
  storage: Storage
  threshold: float
  workers: "_Workers"
  lock_path: pathlib.Path
  progress: StudyProgress

  def __post_init__(self) -> None:
    self._running: dict[concurrent.futures.Future[Run | None], ClaimedTrial] = {}
    self._attempts: dict[Key, int] = {}
    self._deaths = 0

  def run(self, stop: StopRequest) -> dict[Key, Run]:
    """Returns all finished runs once the study misses none.

    Raises:
      Interrupted: the stop was requested; nothing runs any more.
      UsageError: a trial cannot be run.
    """
    alive_at = -math.inf
    try:
      while not stop.requested:
        if time.monotonic() - alive_at >= HEARTBEAT_SECONDS:
          alive_at = time.monotonic()
          self.storage.heartbeat(self._running.values())
          self.storage.fail_abandoned()
          self.storage.fail_stale()
        runs = self.storage.runs()
        missing = missing_runs(self.study, runs, self.threshold)
        if missing:
          self.storage.enqueue(missing)
          self._start(missing)
        self.progress.update(runs, [key for _, key in missing], len(self._running))
        if not missing:
          return runs
        self._wait(stop)
      raise Interrupted
    finally:
      self.workers.close()
      self._end_all()

  def _end_all(self) -> None:
    # What ended while the workers closed counts; the rest goes on another time.
    for future, claim in self._running.items():
      done = future.done() and not future.cancelled() and not future.exception()
      run = future.result() if done else None
      if run is not None:
        self.storage.complete(claim, run)
      else:
        self.storage.fail(claim, "interrupted")
    self._running.clear()

  def _start(self, missing: Sequence[tuple[Search, Key]]) -> None:
    searches = {key: search for search, key in missing}
    while len(self._running) < self.workers.capacity:
      claim = self.storage.claim(searches, self.lock_path)
      if claim is None:
        return
      key = claim.key
      config = searches[key].run_config(key.learning_rate, key.seed)
      try:
        self._running[self.workers.submit(config, key)] = claim
      except BrokenProcessPool:
        # A process died while it had nothing to do, or just now.
        self.storage.fail(claim, "its process died")
        self._replace_workers()
        return

  def _wait(self, stop: StopRequest) -> None:
    if not self._running:
      # All that is left runs on other machines.
      time.sleep(_POLL_SECONDS)
      return
    # Reading all trials takes long in a large study. It is enough once a run has ended,
    # or in time for the next sign of life.
    look_at = time.monotonic() + HEARTBEAT_SECONDS / 2
    done: set[concurrent.futures.Future[Run | None]] = set()
    while not done and not stop.requested and time.monotonic() < look_at:
      done, _ = concurrent.futures.wait(
        self._running,
        timeout=_POLL_SECONDS,
        return_when=concurrent.futures.FIRST_COMPLETED,
      )
    died = False
    for future in done:
      claim = self._running.pop(future)
      try:
        run = future.result()
      except BrokenProcessPool:
        died = True
        self.storage.fail(claim, "its process died")
      except UsageError:
        self.storage.fail(claim, "it cannot be run")
        raise
      except Exception as error:
        self._fail(claim, error)
      else:
        if run is None:
          self.storage.fail(claim, "interrupted")
        else:
          self._deaths = 0
          self.storage.complete(claim, run)
    # Some systems send their signals to all processes of a command.
    if died and not stop.requested:
      self._replace_workers()

  def _fail(self, claim: ClaimedTrial, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    self.storage.fail(claim, reason)
    attempts = self._attempts[claim.key] = self._attempts.get(claim.key, 0) + 1
    where = run_dir(self.workers.trials_dir, claim.key)
    self.progress.message(f"The trial in {where} failed and is retried: {reason}")
    if attempts == _MAX_ATTEMPTS:
      raise UsageError(f"The trial in {where} failed {attempts} times: {reason}")

  def _replace_workers(self) -> None:
    self._deaths += 1
    if self._deaths == _MAX_ATTEMPTS:
      raise UsageError(
        f"Worker processes died {self._deaths} times before a trial finished (too "
        "little memory?): use fewer --workers. Finished trials are kept."
      )
    # The death of one breaks the pool: its other processes were told to save and end.
    self._end_all()
    self.progress.message("A worker process died: its trial is retried.")
    self.workers.replace()


class _Workers:
  """Processes that train, or threads that each have a group of devices.

  Attributes:
    trials_dir: the directory of the runs' own ones.
    capacity: trials that run at the same time.
  """

  def __init__(
    self,
    trials_dir: pathlib.Path,
    num_workers: int,
    devices_per_trial: int,
    stop: StopRequest,
  ):
    self.trials_dir = trials_dir
    self._num_workers = num_workers
    self._stop = stop
    self._executor: concurrent.futures.Executor
    if num_workers == 1:
      devices = jax.local_devices()
      self._groups: queue.SimpleQueue[list[jax.Device]] = queue.SimpleQueue()
      for start in range(0, len(devices), devices_per_trial):
        self._groups.put(devices[start : start + devices_per_trial])
      self.capacity = self._groups.qsize()
      self._executor = concurrent.futures.ThreadPoolExecutor(self.capacity)
    else:
      self.capacity = num_workers
      self._start_processes()

  def _start_processes(self) -> None:
    # Forking would copy JAX's locks without the threads that hold them.
    context = get_context("spawn")
    there, self._alive = context.Pipe(duplex=False)
    self._executor = concurrent.futures.ProcessPoolExecutor(
      self._num_workers, context, _start_worker, (there, self._num_workers)
    )

  def submit(
    self, config: TrainConfig, key: Key
  ) -> "concurrent.futures.Future[Run | None]":
    """Starts a run; its result is None if it was asked to stop."""
    workdir = run_dir(self.trials_dir, key)
    if self._num_workers == 1:
      return self._executor.submit(self._run_in_thread, config, workdir, key)
    with _without_interrupts():
      return self._executor.submit(_run_in_process, config, workdir, key)

  def _run_in_thread(
    self, config: TrainConfig, workdir: pathlib.Path, key: Key
  ) -> Run | None:
    devices = self._groups.get()
    try:
      return _run(config, workdir, key, devices=devices, stop=self._stop)
    finally:
      self._groups.put(devices)

  def replace(self) -> None:
    """Starts new processes in place of broken ones."""
    self.close()
    self._start_processes()

  def close(self) -> None:
    """Lets the runs save and waits for their ends."""
    if self._num_workers == 1:
      self._stop.requested = True
    else:
      self._alive.close()
    self._executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
  """Lets the processes that start here never see SIGINT, not even while they start.

  A terminal interrupts every process of a study: the command passes it on.
  """
  if not hasattr(signal, "pthread_sigmask"):  # Windows.
    yield
    return
  mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start_worker(connection: Connection, num_workers: int) -> None:
  """Prepares a process that trains beside others, before anything of JAX."""
  # XLA:CPU takes its number of threads from there, or else has one for each core, in
  # every process, and they wait for each other (docs/performance.md).
  os.environ.setdefault("NPROC", str(max(1, num_cores() // num_workers)))
  # As in the programs: such a cache costs time alone.
  warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation")

  def watch() -> None:
    # Nothing is ever sent: the end of the file is that the command closed it or died.
    with contextlib.suppress(EOFError, OSError):
      connection.recv()
    while True:
      # Again and again: a trial in its last step takes the first one for itself, and
      # the process would then wait for another trial forever.
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1.0)

  threading.Thread(target=watch, daemon=True).start()


def _run_in_process(config: TrainConfig, workdir: pathlib.Path, key: Key) -> Run | None:
  run = _run(config, workdir, key)
  if run is None:
    # Nobody would tell this process to end: the pool is broken or its owner gone.
    os._exit(0)
  return run


def _run(
  config: TrainConfig,
  workdir: pathlib.Path,
  key: Key,
  *,
  devices: Sequence[jax.Device] | None = None,
  stop: StopRequest | None = None,
) -> Run | None:
  deadline = time.monotonic() + _SAVE_SECONDS
  while True:
    start = time.monotonic()
    try:
      result = train(config, workdir, show_progress=False, devices=devices, stop=stop)
      break
    except LockedError:
      if start > deadline:
        raise
      if stop is not None and stop.requested:
        return None
      time.sleep(0.2)
  if result.status == "interrupted":
    return None
  # Other processes may have worked on it: this one, or an earlier study of the same
  # workdir whose database is gone.
  seconds = max(time.monotonic() - start, _seconds(result))
  return record(key, result, read_metrics(workdir), seconds)


def record(
  key: Key, result: Result, rows: Sequence[Mapping[str, Any]], seconds: float
) -> Run:
  """Returns what a study keeps of a finished run."""
  names = {field.name for field in dataclasses.fields(Run)} & vars(result).keys()
  return Run(
    **key._asdict(),
    **{name: getattr(result, name) for name in names},
    history=make_history(rows),
    seconds=float(f"{seconds:.4g}"),
  )


def run_sequentially(study: Study, workdir: str | os.PathLike[str]) -> StudyResults:
  """Runs a study to its end, where every trial needs all that there is.

  The same call goes on with an interrupted study. After
  `training.distributed.initialize` every process makes the same call. Calls with other
  parts of a study may share its workdir.

  Args:
    workdir: as that of `run`, or a folder of a bucket.

  Returns:
    The results; the runs have their histories on process 0 alone.

  Raises:
    UsageError: a configuration, the data or the workdir cannot be used.
    Interrupted: a signal asked to stop; the running trial was saved.
  """
  check(study)
  for search in study.searches:
    try:
      search.run_config(search.config.learning_rate, 0).validate(jax.device_count())
    except UsageError as error:
      raise UsageError(f"{search.title}: {error}") from None
  with distributed.share_errors():
    threshold = trains_above(study)
  first = distributed.is_first()
  runs: dict[Key, Run] = {}
  while missing := missing_runs(study, runs, threshold):
    total = len(runs) + len(missing)
    for search, key in missing:
      if first:
        print(f"Run {len(runs) + 1} of {total}: {search.title}, seed {key.seed}")
      directory = os.path.join(workdir, run_dir("trials", key))
      result = train(search.run_config(key.learning_rate, key.seed), directory)
      if result.status == "interrupted":
        raise Interrupted
      rows = read_metrics(directory) if first else []
      runs[key] = record(key, result, rows, _seconds(result))
  return summarize(study, runs, threshold, command_line())


def _seconds(result: Result) -> float:
  """Returns what a run took, finished by this call or by an earlier one."""
  speed, begin = result.images_per_second, result.seconds_to_first_step
  steps = 0.0 if speed is None else result.step * result.config["batch_size"] / speed
  return steps + (begin or 0.0)
