"""Runs many training runs, side by side where that is faster."""

import multiprocessing
import os
import pathlib
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import jax

from skipinit_jax.errors import UsageError
from skipinit_jax.training import Result, TrainConfig, train
from skipinit_jax.training.signals import StopRequest


class Trial(NamedTuple):
  """One run of a study.

  Attributes:
    config: its configuration.
    workdir: its own directory.
  """

  config: TrainConfig
  workdir: pathlib.Path


class Interrupted(Exception):
  """A signal stopped the study; the same call goes on where it stopped."""


def default_num_workers() -> int:
  """Returns a worker for each core of a CPU, one where there is an accelerator.

  The small networks of a study keep one core busy, and processes cannot share an
  accelerator.
  """
  if jax.default_backend() != "cpu":
    return 1
  # Fewer than the machine's where a job may use only some; macOS cannot tell.
  may_tell = hasattr(os, "sched_getaffinity")
  return len(os.sched_getaffinity(0)) if may_tell else os.cpu_count() or 1


def run_trials(
  trials: Sequence[Trial],
  num_workers: int,
  report: Callable[[Trial, Result], None],
) -> list[Result]:
  """Runs trials, in order of the sequence as workers become free.

  Args:
    trials: the trials; those whose workdir holds a result are not repeated.
    num_workers: processes to run them in; 1 uses this process.
    report: is told of each result as it comes.

  Returns:
    The results, in the order of the trials.

  Raises:
    UsageError: a trial cannot be run, or its process died.
    Interrupted: a signal asked to stop; running trials were saved.
  """
  if num_workers < 1:
    raise UsageError(f"num_workers is {num_workers}: it must be at least 1.")
  results: dict[int, Result] = {}
  run = _run_here if num_workers == 1 else _run_in_processes
  for index, result in run(trials, min(num_workers, len(trials))):
    if result.status == "interrupted":
      raise Interrupted
    results[index] = result
    report(trials[index], result)
  if len(results) < len(trials):
    raise Interrupted
  return [results[index] for index in range(len(trials))]


def _run_here(
  trials: Sequence[Trial], num_workers: int
) -> Iterator[tuple[int, Result]]:
  del num_workers
  with StopRequest() as stop:
    for index, trial in enumerate(trials):
      if stop.requested:
        return
      yield index, train(trial.config, trial.workdir, show_progress=False)


def _run_in_processes(
  trials: Sequence[Trial], num_workers: int
) -> Iterator[tuple[int, Result]]:
  # Forking would copy JAX's locks without the threads that hold them.
  context = multiprocessing.get_context("spawn")
  waiting = list(enumerate(trials))[::-1]
  running: dict[Connection, int] = {}
  connections, processes = [], []
  with StopRequest() as stop:
    try:
      for _ in range(num_workers):
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there,), daemon=True)
        process.start()
        # Only the worker holds its end, so that its death is an end of file here.
        there.close()
        connections.append(here)
        processes.append(process)
        running[here], trial = waiting.pop()
        here.send(trial)
      while running:
        # A timeout, because a signal is handled between waits only.
        for connection in wait(list(running), timeout=0.5):
          assert isinstance(connection, Connection)
          index = running.pop(connection)
          try:
            result = connection.recv()
          except (EOFError, ConnectionError):
            if stop.requested:
              continue
            raise UsageError(
              f"The process of the trial in {trials[index].workdir} died: run the "
              "same command again to go on."
            ) from None
          if isinstance(result, UsageError):
            raise result
          if waiting and not stop.requested:
            running[connection], trial = waiting.pop()
            connection.send(trial)
          yield index, result
        if stop.requested:
          for process in processes:
            process.terminate()
    finally:
      # A running trial takes the signal as a request to save; the closed connection
      # then ends its process.
      for connection in connections:
        connection.close()
      for process in processes:
        process.terminate()
        process.join()


def _work(connection: Connection) -> None:
  result: Result | UsageError
  # A terminal interrupts every process of a study: the study's own passes it on.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  while True:
    try:
      trial = connection.recv()
      try:
        result = train(trial.config, trial.workdir, show_progress=False)
      except UsageError as error:
        result = error
      connection.send(result)
    except (EOFError, BrokenPipeError):
      # The study has ended.
      return
