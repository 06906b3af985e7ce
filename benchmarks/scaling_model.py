"""How long a step takes on many accelerators: a model, with every assumption in it.

A step is the local work, the all-reduces that forward and backward pass wait for, and
the all-reduce of the gradients:

    local = max(FLOPs / reachable FLOP/s, bytes / reachable memory bandwidth)
    step = parts x (local + sum of all_reduce(waited bytes)) + all_reduce(update bytes)

An all-reduce is a fixed time, a time for each hop, and bytes over bandwidth. What one
device does was counted in compiled programs; `read_tables` has the tables of
docs/scaling.md.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from benchmarks import benchmark
from benchmarks.compiled_step import StepCost
from skipinit_jax.document import Table
from skipinit_jax.files import read_json

# Shares of the peak FLOP/s, and of the memory's bandwidth, that a program reaches:
# assumptions.
_REACHABLE_FLOPS = 0.5
_REACHABLE_BANDWIDTH = 0.8


class Accelerator(NamedTuple):
  """An accelerator, its interconnect within an island, and the network of islands."""

  name: str
  flops: float  # Peak FLOP/s in bfloat16.
  memory_bandwidth: float  # Bytes/s.
  memory_bytes: float
  host_devices: int
  # Shape of the torus by the number of devices; without one, a switch connects them.
  shapes: Mapping[int, tuple[int, ...]] | None
  island: int  # Devices of the largest island.
  # Bytes/s of one link in one direction: along an axis of the torus, or to the switch.
  link_bandwidth: float
  wraps: tuple[int, ...]  # Sizes of a torus' axis whose ends are connected.
  base_seconds: float  # An all-reduce without data and hops.
  hop_seconds: float  # A hop in the island.
  network_bandwidth: float  # Bytes/s that a device sends to other islands.
  network_hop_seconds: float  # A hop between islands.


# Peak, memory and pods: cloud.google.com/tpu/docs/v4, /v5e and /v6e. Links, and 25 GB/s
# from a host to other pods: "How to Scale Your Model" (Austin et al., 2025,
# jax-ml.github.io/scaling-book). It has a hop at 1 us, and a measured all-gather of
# three hops that takes 8 us. The latency between pods is our assumption.
_V5E = Accelerator(
  name="TPU v5e",
  flops=197e12,
  memory_bandwidth=819e9,
  memory_bytes=16e9,
  host_devices=8,
  shapes={4: (2, 2), 16: (4, 4), 64: (8, 8), 256: (16, 16)},
  island=256,
  link_bandwidth=50e9,
  wraps=(16,),
  base_seconds=5e-6,
  hop_seconds=1e-6,
  network_bandwidth=25e9 / 8,
  network_hop_seconds=20e-6,
)
_V6E = _V5E._replace(
  name="TPU v6e",
  flops=918e12,
  memory_bandwidth=1638e9,
  memory_bytes=32e9,
  link_bandwidth=100e9,
)
_V4 = _V5E._replace(
  name="TPU v4",
  flops=275e12,
  memory_bandwidth=1200e9,
  memory_bytes=32 * 2**30,
  host_devices=4,
  shapes={4: (2, 2), 16: (2, 2, 4), 64: (4, 4, 4), 256: (4, 8, 8), 1024: (8, 8, 16)},
  island=4096,
  link_bandwidth=45e9,
  wraps=(4, 8, 16),
  network_bandwidth=25e9 / 4,
)
# NVIDIA's data sheet (SXM, dense bfloat16, 900 GB/s of NVLink both ways together), one
# 400 Gb/s port of InfiniBand a GPU (DGX H100), and the latencies of NCCL's own cost
# model (src/graph/tuning.cc: tree, protocol LL).
_H100 = Accelerator(
  name="H100",
  flops=989e12,
  memory_bandwidth=3350e9,
  memory_bytes=80e9,
  host_devices=8,
  shapes=None,
  island=8,
  link_bandwidth=450e9,
  wraps=(),
  base_seconds=6.8e-6,
  hop_seconds=0.6e-6,
  network_bandwidth=50e9,
  network_hop_seconds=5e-6,
)
ACCELERATORS = (_V4, _V5E, _V6E, _H100)


def all_reduce_seconds(chip: Accelerator, num_devices: int, num_bytes: float) -> float:
  """Returns the time of one all-reduce of a power of four of devices.

  On a torus it is a reduce-scatter and an all-gather along every axis at once, each
  in both directions. Behind a switch the hops are those of NCCL's tree: a chain within
  the host, both ways. Between islands, each device exchanges its share of the sum with
  those at its place in the others, in a tree.
  """
  if num_devices == 1:
    return 0.0
  inner = min(num_devices, chip.island)
  islands = num_devices // inner
  hops, bandwidth = 2 * (inner - 1), chip.link_bandwidth
  if chip.shapes is not None:
    hops, bandwidth = 0, 0.0
    for size in chip.shapes[inner]:
      wraps = size in chip.wraps
      hops += 2 * (size // 2 if wraps else size - 1)
      # At the end of an axis that does not wrap, there is one link.
      bandwidth += (2 if wraps else 1) * chip.link_bandwidth
  seconds = chip.base_seconds + hops * chip.hop_seconds
  seconds += 2 * (inner - 1) / inner * num_bytes / bandwidth
  if islands > 1:
    seconds += 2 * math.log2(islands) * chip.network_hop_seconds
    share = num_bytes / inner
    seconds += 2 * (islands - 1) / islands * share / chip.network_bandwidth
  return seconds


class StepTime(NamedTuple):
  """Seconds of a step's computation, its waits, and the sum of the gradients."""

  local: float
  waiting: float
  update: float

  @property
  def total(self) -> float:
    """Seconds of the step."""
    return sum(self)

  @property
  def waiting_share(self) -> float:
    """Share of the step that is waiting."""
    return self.waiting / self.total


def step_time(
  cost: StepCost, accelerator: Accelerator, num_devices: int, parts: int = 1
) -> StepTime:
  """Returns the time of a step.

  Args:
    cost: what one device does in one part of the batch.
    num_devices: devices that share the batch, a power of four.
    parts: parts of the batch whose gradients are added up one after the other.
  """
  compute = cost.flops / (_REACHABLE_FLOPS * accelerator.flops)
  memory = cost.num_bytes / (_REACHABLE_BANDWIDTH * accelerator.memory_bandwidth)
  waiting = sum(
    all_reduce_seconds(accelerator, num_devices, each) for each in cost.waited_bytes
  )
  update = all_reduce_seconds(accelerator, num_devices, cost.update_bytes)
  return StepTime(parts * max(compute, memory), parts * waiting, update)


_GLOBAL_BATCH = 4096
_DEVICES = (1, 4, 16, 64, 256, 1024)
_BATCHES = (4, 16, 64, 256)
_SMALL_BATCH, _BATCH = 4, 64
_NETWORKS = ("ResNet-50", "Wide-ResNet 16-4", "Wide-ResNet 28-10")
_METHODS = {"batch_norm": "Batch norm", "skipinit": "SkipInit"}


class Key(NamedTuple):
  """What a cost is of: a network, a method, and the images of a device."""

  network: str
  method: str
  batch: int


Costs = Mapping[Key, StepCost]

KEYS = (
  *(Key(*each, _BATCH) for each in itertools.product(_NETWORKS, _METHODS)),
  *(Key("ResNet-50", method, _SMALL_BATCH) for method in _METHODS),
)
"""The costs that the tables need."""


def read_costs(workdir: pathlib.Path) -> dict[Key, StepCost]:
  """Returns the costs of a folder's costs.json."""
  costs = {}
  for row in read_json(workdir / "costs.json"):
    key = Key(*(row.pop(name) for name in Key._fields))
    costs[key] = StepCost(**row | {"waited_bytes": tuple(row["waited_bytes"])})
  return costs


def resnet_cost(costs: Costs, method: str, batch: int) -> StepCost:
  """Returns what a device does in ResNet-50's step with any batch.

  FLOPs and bytes are taken as linear in the batch: a fixed part, such as the
  parameters' update, and a part for each image. The collectives stay the same.
  """
  small = costs[Key("ResNet-50", method, _SMALL_BATCH)]
  usual = costs[Key("ResNet-50", method, _BATCH)]
  weight = (batch - _SMALL_BATCH) / (_BATCH - _SMALL_BATCH)
  return dataclasses.replace(
    usual,
    flops=small.flops + weight * (usual.flops - small.flops),
    num_bytes=small.num_bytes + weight * (usual.num_bytes - small.num_bytes),
  )


def read_tables(workdir: pathlib.Path) -> dict[str, Table]:
  """Returns the tables of docs/scaling.md by name, of a folder's costs.json."""
  costs = read_costs(workdir)
  chips, pairs = ACCELERATORS, [*itertools.product(ACCELERATORS, _DEVICES)]
  return benchmark.make_tables(
    {
      "costs": [_cost_row(*each) for each in costs.items() if each[0].batch == _BATCH],
      "accelerators": [_accelerator_row(chip) for chip in chips],
      "latency": [_latency_row(chip) for chip in chips],
      "waiting_share": [_waiting_row(costs, *pair) for pair in pairs if pair[1] > 1],
      "strong_scaling": [_strong_row(costs, *pair) for pair in pairs],
      "networks": [
        _network_row(costs, *each) for each in itertools.product(_NETWORKS, chips)
      ],
      "sensitivity": [_sensitivity_row(costs, chip) for chip in chips],
    }
  )


def _cost_row(key: Key, cost: StepCost) -> dict[str, str]:
  return {
    "network and method": f"{key.network}, {_METHODS[key.method]}",
    "million parameters": f"{cost.parameters / 1e6:.2f}",
    "GFLOP/image": f"{cost.flops / key.batch / 1e9:.2f}",
    "MB/image": f"{cost.num_bytes / key.batch / 1e6:.0f}",
    "GB of memory": f"{cost.memory_bytes / 1e9:.1f}",
    "all-reduces waited for": str(len(cost.waited_bytes)),
    "MB all-reduced": f"{(sum(cost.waited_bytes) + cost.update_bytes) / 1e6:.1f}",
  }


def _accelerator_row(chip: Accelerator) -> dict[str, str]:
  return {
    "accelerator": chip.name,
    "TFLOP/s (bfloat16)": f"{chip.flops / 1e12:.0f}",
    "memory GB/s": f"{chip.memory_bandwidth / 1e9:.0f}",
    "memory GB": f"{chip.memory_bytes / 1e9:.0f}",
    "devices of an island": str(chip.island),
    "GB/s a link and direction": f"{chip.link_bandwidth / 1e9:.0f}",
    "GB/s to other islands": f"{chip.network_bandwidth / 1e9:.1f}",
    "devices of a host": str(chip.host_devices),
  }


def _latency_row(chip: Accelerator) -> dict[str, str]:
  row = {"accelerator": chip.name}
  for devices in _DEVICES[1:]:
    row[str(devices)] = f"{1e6 * all_reduce_seconds(chip, devices, 2048):.0f}"
  return row


def _sensitivity_row(costs: Costs, chip: Accelerator) -> dict[str, str]:
  row = {"accelerator": chip.name}
  latencies = ("base_seconds", "hop_seconds", "network_hop_seconds")
  for factor in (0.25, 0.5, 1, 2):
    slower = chip._replace(**{name: factor * getattr(chip, name) for name in latencies})
    time = step_time(costs[Key("ResNet-50", "batch_norm", _BATCH)], slower, 256)
    row[str(factor)] = f"{time.waiting_share:.0%}"
  return row


def _waiting_row(costs: Costs, chip: Accelerator, num_devices: int) -> dict[str, str]:
  """Returns the shares that waits take, and the batches that make them small."""
  steps = [resnet_cost(costs, "batch_norm", batch) for batch in _BATCHES]
  times = [step_time(cost, chip, num_devices) for cost in steps]
  row = {"accelerator, devices": f"{chip.name}, {num_devices}"}
  for batch, time in zip(_BATCHES, times, strict=True):
    row[str(batch)] = f"{time.waiting_share:.0%}"
  local = [time.local for time in times]
  for share in (0.2, 0.05):
    # waiting / (local + waiting + update) = share
    wanted = times[0].waiting * (1 / share - 1) - times[0].update
    sign = "≤ " if wanted <= local[0] else "> " if wanted > local[-1] else ""
    first = np.interp(wanted, local, _BATCHES)
    row[f"below {share:.0%} from"] = f"{sign}{first:.0f}"
  return row


def _strong_row(costs: Costs, chip: Accelerator, num_devices: int) -> dict[str, str]:
  """Returns the times of ResNet-50's step with the batch of all devices fixed."""
  batch = _GLOBAL_BATCH // num_devices
  # More images at once would not fit, or gain nothing.
  parts = max(1, batch // _BATCHES[-1])
  batch_norm, skipinit = (
    step_time(resnet_cost(costs, method, batch // parts), chip, num_devices, parts)
    for method in _METHODS
  )
  rate = _GLOBAL_BATCH / skipinit.total
  return {
    "accelerator, devices": f"{chip.name}, {num_devices}",
    "images a device": str(batch // parts),
    "batch norm: local": f"{1e3 * batch_norm.local:.1f}",
    "waiting": f"{1e3 * batch_norm.waiting:.1f}",
    "gradients": f"{1e3 * batch_norm.update:.1f}",
    "step": f"{1e3 * batch_norm.total:.1f}",
    "SkipInit: step": f"{1e3 * skipinit.total:.1f}",
    "SkipInit is faster by": f"{batch_norm.total / skipinit.total:.2f}",
    "images/s": f"{rate:,.0f}",
    "images/s a host": f"{rate / max(1, num_devices // chip.host_devices):,.0f}",
  }


def _network_row(costs: Costs, network: str, chip: Accelerator) -> dict[str, str]:
  batch_norm, skipinit = (
    step_time(costs[Key(network, method, _BATCH)], chip, 256) for method in _METHODS
  )
  return {
    "network and accelerator": f"{network}, {chip.name}",
    "batch norm": f"{1e3 * batch_norm.total:.1f}",
    "SkipInit": f"{1e3 * skipinit.total:.1f}",
    "batch norm waits": f"{batch_norm.waiting_share:.0%}",
    "images/s (SkipInit)": f"{_BATCH * 256 / skipinit.total:,.0f}",
  }
