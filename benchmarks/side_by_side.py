"""Measures train steps of several peers side by side, each in its own process.

The peers take turns, A B A B, so that other work on the machine meets all of them. One
that does not have its turn waits and computes nothing.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import benchmark
from benchmarks.peer import Case
from skipinit_jax.errors import UsageError

_ROUND_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Peer:
  """Who takes the steps.

  Attributes:
    name: in tables.
    module: the module of this folder whose `make_step` it calls.
    options: what it is told besides the case, or in place of a field of the case.
  """

  name: str
  module: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SKIPINIT_JAX = Peer("skipinit_jax", "peer_jax")
PLAIN_JIT = Peer("skipinit_jax, plain jax.jit", "peer_jax", {"options": False})
# Flax's own examples compile the initialization.
FLAX = Peer("Flax, unrolled", "peer_flax", {"compile_init": True})
TORCH_EAGER = Peer("PyTorch, eager", "peer_torch", {"compiled": False})
TORCH_COMPILE = Peer("PyTorch, torch.compile", "peer_torch", {"compiled": True})


class Measured(NamedTuple):
  """What was measured of a peer.

  Attributes:
    step_seconds: a `benchmark.summary`.
    seconds_to_first_step: from the start of the process to the end of its first step.
    peak_gigabytes: the most memory that the process had.
  """

  step_seconds: dict[str, float]
  seconds_to_first_step: float
  peak_gigabytes: float


class _Process:
  """A peer that is running.

  Attributes:
    seconds_to_first_step: from the start of the process.
  """

  def __init__(self, peer: Peer, case: Case):
    begin = time.perf_counter()
    self._name = peer.name
    arguments = json.dumps({**dataclasses.asdict(case), **peer.options})
    self._process = subprocess.Popen(
      [sys.executable, "-m", "benchmarks.peer", peer.module, arguments],
      # Each compiles all of its programs, as on a machine that never saw them.
      env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    assert self._process.stdin is not None and self._process.stdout is not None
    self._requests, self._answers = self._process.stdin, self._process.stdout
    self._read()
    self.seconds_to_first_step = time.perf_counter() - begin
    # The second step still fills caches; the third tells how many fit into a round.
    self._steps = max(1, round(_ROUND_SECONDS / self._take(2)[-1]))

  def _read(self) -> Any:
    line = self._answers.readline()
    if not line:
      raise UsageError(
        f"{self._name} ended with status {self._process.wait()} before its turn: the "
        "messages above are its own."
      )
    return json.loads(line)

  def _take(self, steps: int) -> list[float]:
    self._requests.write(f"{steps}\n")
    self._requests.flush()
    return list(self._read())

  def take_round(self) -> list[float]:
    """Takes a few steps and returns their seconds."""
    return self._take(self._steps)

  def end(self) -> float:
    """Ends the process and returns the most memory that it had, in bytes."""
    self._requests.close()
    return float(self._read())

  def kill(self) -> None:
    """Ends the process if it still runs."""
    self._process.kill()
    self._process.wait()


def measure(case: Case, peers: Sequence[Peer], rounds: int) -> dict[str, Measured]:
  """Measures the peers' train steps on one case.

  Returns:
    What was measured, by the peers' names.

  Raises:
    UsageError: a peer failed.
  """
  with contextlib.ExitStack() as stack:
    processes = {}
    for peer in peers:
      processes[peer.name] = _Process(peer, case)
      stack.callback(processes[peer.name].kill)
    ways = {name: process.take_round for name, process in processes.items()}
    turns = benchmark.take_turns(ways, rounds)
    return {
      name: Measured(
        benchmark.summary([*itertools.chain(*turns[name])]),
        benchmark.digits(process.seconds_to_first_step),
        benchmark.digits(process.end() / 1e9),
      )
      for name, process in processes.items()
    }
