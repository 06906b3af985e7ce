"""One of the processes that test_distributed.py starts: trains what it is told.

Its arguments are the coordinator's address, the number of processes, its own number,
and the tasks as JSON. It prints the outcome of each as a line of JSON.
"""

import contextlib
import json
import sys
from unittest import mock

from skipinit_jax import data
from skipinit_jax.errors import UsageError
from skipinit_jax.training import TrainConfig, distributed, loop
from skipinit_jax.training.metrics import read_metrics


class StopAfter:
  """Requests a stop when `metrics.jsonl` has a row of an epoch."""

  def __init__(self, workdir, epoch):
    self._workdir = workdir
    self._epoch = epoch

  @property
  def requested(self):
    with contextlib.suppress(UsageError):
      return any(row["epoch"] >= self._epoch for row in read_metrics(self._workdir))
    return False


def run(task, process_id):
  """Trains, with what the task says of this process alone, and returns the outcome."""
  here = task.get("on_process", {}).get(str(process_id), {})
  config = TrainConfig(**task["config"] | here.get("config", {}))
  stop = None
  if "stop_after" in here:
    stop = StopAfter(task["workdir"], here["stop_after"])
  with contextlib.ExitStack() as stack:
    if "code" in here:
      code = distributed._code_digests() | here["code"]
      stack.enter_context(mock.patch.object(distributed, "_code_digests", lambda: code))
    if "data_error" in here:
      error = UsageError(here["data_error"])
      stack.enter_context(mock.patch.object(data, "load", side_effect=error))
    try:
      result = loop.train(config, task["workdir"], show_progress=False, stop=stop)
    except UsageError as error:
      return {"error": str(error)}
  return {"status": result.status, "step": result.step, "device": result.device}


def main():
  address, num_processes, process_id, tasks = sys.argv[1:]
  distributed.initialize(address, int(num_processes), int(process_id))
  for task in json.loads(tasks):
    print("outcome", json.dumps(run(task, int(process_id))), flush=True)


if __name__ == "__main__":
  main()
