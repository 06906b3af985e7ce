"""Measures train steps of several peers side by side, each in its own process.

The peers take turns, A B A B, so that other work on the machine meets all of them. One
that does not have its turn waits and computes nothing.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import machine
from benchmarks.peer import Case
from skipinit_jax.errors import UsageError

_ROUND_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Peer:
  """Who takes the steps.

  Attributes:
    name: in tables.
    module: the program, below `benchmarks`, that serves steps.
    options: what it is told besides the case, or in place of a field of the case.
  """

  name: str
  module: str
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SKIPINIT_JAX = Peer("skipinit_jax", "peer_jax")
# Flax's own examples compile the initialization.
FLAX = Peer("Flax, unrolled", "peer_flax", {"compile_init": True})
TORCH_EAGER = Peer("PyTorch, eager", "peer_torch", {"compiled": False})
TORCH_COMPILE = Peer("PyTorch, torch.compile", "peer_torch", {"compiled": True})


class _Process:
  """A peer that is running."""

  def __init__(self, peer: Peer, case: Case):
    begin = time.perf_counter()
    self.step_seconds: list[float] = []
    self._peer = peer
    self._process = subprocess.Popen(
      [
        sys.executable,
        "-m",
        f"benchmarks.{peer.module}",
        json.dumps({**dataclasses.asdict(case), **peer.options}),
      ],
      # Each compiles all of its programs, as on a machine that never saw them.
      env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self._read()
    self.seconds_to_first_step = time.perf_counter() - begin
    # The second step still fills caches; it tells how many fit into a round.
    warm_up = self._take(2)
    self._steps = max(1, round(_ROUND_SECONDS / warm_up[-1]))

  def _read(self) -> Any:
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      raise UsageError(
        f"{self._peer.name} ended with status {self._process.wait()} before its turn: "
        "the messages above are its own."
      )
    return json.loads(line)

  def _take(self, steps: int) -> list[float]:
    assert self._process.stdin is not None
    self._process.stdin.write(f"{steps}\n")
    self._process.stdin.flush()
    return list(self._read())

  def take_round(self) -> None:
    """Takes a few steps and keeps their times."""
    self.step_seconds += self._take(self._steps)

  def end(self) -> float:
    """Ends the process and returns the most memory that it had, in bytes."""
    assert self._process.stdin is not None
    self._process.stdin.close()
    peak = float(self._read())
    self._process.wait()
    return peak

  def kill(self) -> None:
    """Ends the process if it still runs."""
    self._process.kill()
    self._process.wait()


def measure(case: Case, peers: Sequence[Peer], rounds: int) -> dict[str, Any]:
  """Measures the peers' train steps on one case.

  Args:
    case: what they train.
    peers: who takes the steps.
    rounds: turns of each peer.

  Returns:
    A JSON object of the case and, by the peers' names, the seconds of a step, images a
    second, the seconds from the process's start to the end of its first step, and the
    process's peak memory.

  Raises:
    UsageError: a peer failed.
  """
  flops = case.step_flops
  results: dict[str, Any] = {}
  with contextlib.ExitStack() as stack:
    processes = {}
    for peer in peers:
      processes[peer.name] = _Process(peer, case)
      stack.callback(processes[peer.name].kill)
    for _ in range(rounds):
      for process in processes.values():
        process.take_round()
    for name, process in processes.items():
      step = machine.summary(process.step_seconds)
      results[name] = {
        "step_seconds": step,
        "images_per_second": float(f"{case.batch_size / step['median']:.3g}"),
        "gflops_per_second": float(f"{flops / step['median'] / 1e9:.3g}"),
        "seconds_to_first_step": float(f"{process.seconds_to_first_step:.3g}"),
        "peak_gigabytes": float(f"{process.end() / 1e9:.3g}"),
      }
  return {
    "case": dataclasses.asdict(case),
    "name": case.name,
    "gflops": float(f"{flops / 1e9:.3g}"),
    "peers": results,
  }
