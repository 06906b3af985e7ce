"""One run on several processes: how they start, agree and end together.

In JAX's multi-controller runtime each process, usually one a host, runs the same
program and drives its own devices, and computations span the devices of all. So all
processes must take the same steps in the same order. What one of them alone can know,
such as the time or a signal, they exchange first. In a run of one process every
function here returns at once.
"""

import collections
import contextlib
import hashlib
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from skipinit_jax.errors import UsageError
from skipinit_jax.files import to_json
from skipinit_jax.training.config import differences
from skipinit_jax.training.mesh import batch_sharding, make_mesh, replicated
from skipinit_jax.training.record import jax_settings

__all__ = [
  "check_same",
  "exit_process",
  "from_first",
  "gather",
  "in_slurm_step",
  "in_tpu_pod",
  "initialize",
  "is_first",
  "share_errors",
]

# How long processes wait for the last one to start.
_START_SECONDS = 300
# A process that is silent for so long counts as dead, and the runtime ends the others.
# JAX's default is 100. Threads of their own send heartbeats, so that only a machine
# that is dead, cut off or frozen is silent. A shorter time would end runs for a hiccup
# of the network.
_HEARTBEAT_SECONDS = 60
# How long a process that fails waits for the others to fail too.
_LEAVE_SECONDS = 5.0
_METADATA_SECONDS = 5.0
_CHUNK_BYTES = 1024
_MAX_DIFFERENCES = 5


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> None:
  """Joins the processes of one run, before anything else uses JAX.

  Without arguments it joins the tasks of a Slurm step, or the hosts of a Cloud TPU
  slice, if there are several. Anywhere else it does nothing.

  Args:
    coordinator_address: "host:port" of process 0, where that listens.
    process_id: number of this process, from 0.

  Raises:
    UsageError: only some of the arguments are given, they make no sense, process 0
      cannot listen or be reached, or the processes differ in their number of devices.
  """
  arguments: dict[str, Any] = {
    "coordinator_address": coordinator_address,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  missing = [f"--{name}" for name, value in arguments.items() if value is None]
  if not missing:
    _check_address(**arguments)
    arguments["cluster_detection_method"] = "deactivate"
  elif len(missing) < len(arguments):
    raise UsageError(
      f"{' and '.join(missing)} missing: give --coordinator_address, --num_processes "
      "and --process_id together, or none of them."
    )
  elif in_slurm_step():
    arguments = _slurm_arguments()
  elif in_tpu_pod():
    arguments = {}
  else:
    return
  # A library's handler would take the SIGTERM that `StopRequest` is to see.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    **arguments,
    initialization_timeout=_START_SECONDS,
    heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
  )
  # The runtime ends a process by an abort, after saying why: the stacks of all threads,
  # which absl prints then, would hide that.
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
  _check_jax_settings()
  counts = collections.Counter(device.process_index for device in jax.devices())
  if len({*counts.values()}) > 1:
    numbers = ", ".join(f"{counts[i]} (process {i})" for i in sorted(counts))
    raise UsageError(f"The processes' numbers of devices differ: {numbers}.")
  # CPUs connect at their first computation together, and must come to it within 30
  # seconds of each other. Now they do; later one may compile for longer than another.
  mesh = make_mesh()
  ones = jax.make_array_from_callback(
    (mesh.size,), batch_sharding(mesh), lambda _: np.ones(1)
  )
  jax.block_until_ready(jax.jit(jnp.sum, out_shardings=replicated(mesh))(ones))
  gather(None)


def _check_jax_settings() -> None:
  """Compares JAX's settings without a computation, which might hang if they differ.

  Raises:
    UsageError: on every process, if one differs from process 0.
  """
  # JAX has no public way to exchange values before the first computation.
  state = jax_distributed.global_state
  client: Any = state.client
  timeout = 1000 * _START_SECONDS

  def key(name: object) -> str:
    return f"skipinit_jax/settings/{name}"

  mine = json.dumps(jax_settings())
  client.key_value_set(key(state.process_id), mine)
  if state.process_id == 0:
    texts = (
      client.blocking_key_value_get(key(index), timeout)
      for index in range(state.num_processes)
    )
    error = _first_difference([json.loads(text) for text in texts])
    client.key_value_set(key("error"), json.dumps(error))
  error = json.loads(client.blocking_key_value_get(key("error"), timeout))
  if error:
    raise UsageError(error)


def in_slurm_step() -> bool:
  """Tells whether Slurm started this process as one of several tasks of a step."""
  # SLURM_NTASKS alone also is in the shell of an allocation, where one process starts.
  names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
  num_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
  return num_tasks.isdigit() and int(num_tasks) > 1 and all(map(os.getenv, names))


def _slurm_arguments() -> dict[str, Any]:
  num_tasks = os.environ["SLURM_STEP_NUM_TASKS"]
  arguments: dict[str, Any] = {
    "cluster_detection_method": "slurm",
    "num_processes": int(num_tasks),
  }
  if os.environ.get("SLURM_STEP_NUM_NODES") == num_tasks:
    # The only task of its node has all devices; JAX would give it the first GPU alone.
    arguments["local_device_ids"] = []
  return arguments


def in_tpu_pod() -> bool:
  """Tells whether this machine is one of several hosts of a Cloud TPU slice."""
  # JAX sets this variable where it finds TPU chips and their library.
  platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
  if "TPU_ML_PLATFORM" not in os.environ or platforms == "cpu":
    return False
  hosts = os.environ.get(
    "TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES")
  )
  if hosts is None and "TPU_SKIP_MDS_QUERY" not in os.environ:
    hosts = _tpu_metadata("worker-network-endpoints")
  num_slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
  return "," in (hosts or "") or num_slices != "1"


def _tpu_metadata(key: str) -> str:
  """Returns an attribute of this machine from Google's metadata server, or ""."""
  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(
    f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
    headers={"Metadata-Flavor": "Google"},
  )
  try:
    with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as response:
      return str(response.read(), "utf-8")
  except OSError:
    return ""


def _check_address(
  coordinator_address: str, num_processes: int, process_id: int
) -> None:
  """Checks what JAX answers with an abort or, where the port is in use, a crash."""
  host, _, port = coordinator_address.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 2**16:
    raise UsageError(
      f"--coordinator_address is {coordinator_address!r}: it must be HOST:PORT, such "
      "as 10.0.0.1:8476."
    )
  if not 0 <= process_id < num_processes:
    raise UsageError(
      f"--process_id is {process_id}: with --num_processes={num_processes} it must be "
      f"from 0 to {num_processes - 1}."
    )
  if process_id == 0:
    try:
      socket.create_server(("", int(port))).close()
    except OSError as error:
      raise UsageError(
        f"Process 0 cannot listen at port {port} of --coordinator_address "
        f"({error.strerror}): choose another port, the same for all processes."
      ) from None
    return
  deadline = time.monotonic() + _START_SECONDS
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise UsageError(
          "Process 0 does not answer at --coordinator_address="
          f"{coordinator_address} ({error}): start all processes, and name an address "
          "of the first one's host."
        ) from None
    time.sleep(0.2)


def is_first() -> bool:
  """Tells whether this is process 0, which writes the files of a run."""
  return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """Exchanges a value among all processes, each of which calls this.

  Args:
    value: this process's value, which JSON can hold.

  Returns:
    The values of all processes, in their order.
  """
  if jax.process_count() == 1:
    return [value]
  text = json.dumps(value).encode()
  texts = [b""] * jax.process_count()
  # JSON on one line has no newline: chunks of one shape are filled up with them.
  while not all(received.endswith(b"\n") for received in texts):
    chunk, text = text[:_CHUNK_BYTES], text[_CHUNK_BYTES:]
    row = np.frombuffer(chunk.ljust(_CHUNK_BYTES, b"\n"), np.uint8)
    rows = multihost_utils.process_allgather(row)
    texts = [
      received + part.tobytes() for received, part in zip(texts, rows, strict=True)
    ]
  return [json.loads(received) for received in texts]


def from_first(value: Any) -> Any:
  """Returns process 0's value on all processes, each of which calls this.

  Args:
    value: what JSON can hold; the values of the other processes do not count.
  """
  return gather(value if is_first() else None)[0]


@contextlib.contextmanager
def share_errors() -> Iterator[None]:
  """Raises a `UsageError` of one process in the block on all of them.

  The processes leave the block together. Within it they may not exchange anything,
  because a process that fails would not take part.
  """
  own = None
  try:
    yield
  except UsageError as error:
    own = error
  errors = gather(own and str(own))
  if own is not None:
    raise own
  for message in errors:
    if message is not None:
      raise UsageError(message)


def check_same(settings: Mapping[str, Any]) -> None:
  """Checks that all processes run the same code with the same settings.

  Args:
    settings: nested dicts of what `to_json` takes.

  Raises:
    UsageError: on every process, if one differs from process 0.
  """
  if jax.process_count() == 1:
    return
  if error := _first_difference(gather(to_json({**settings, "code": _code_digests()}))):
    raise UsageError(error)


def _first_difference(settings: Sequence[Mapping[str, Any]]) -> str:
  """Returns a sentence on the first process that differs from process 0, or nothing."""
  first, *others = settings
  for process_id, other in enumerate(others, start=1):
    if found := differences(first, other):
      more = len(found) - _MAX_DIFFERENCES
      and_more = f", and {more} more" if more > 0 else ""
      return (
        f"Process {process_id} (here) differs from process 0 (there): "
        f"{', '.join(found[:_MAX_DIFFERENCES])}{and_more}; start all processes with "
        "the same flags, data, settings of JAX and version."
      )
  return ""


def _code_digests() -> dict[str, str]:
  """Returns the start of the SHA-256 digest of each file of this package."""
  package = pathlib.Path(__file__).parents[1]
  digests = {}
  for path in sorted(package.rglob("*.py")):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    digests[path.relative_to(package).as_posix()] = digest[:8]
  return digests


def exit_process(status: int) -> NoReturn:
  """Ends this process after an error, without waiting for the others for long.

  An ordinary exit would wait for the others, which wait for this one in a computation.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  # If all fail, process 0 stays until they have: the runtime ends with it.
  shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  shutdown.start()
  shutdown.join(_LEAVE_SECONDS)
  os._exit(status)
