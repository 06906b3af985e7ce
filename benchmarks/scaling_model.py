"""How long a step takes on many accelerators: a model, with every assumption in it.

A step is the local work, the all-reduces that forward and backward pass wait for, and
the all-reduce of the gradients:

    local = max(FLOPs / reachable FLOP/s, bytes / reachable memory bandwidth)
    step = parts x (local + sum of all_reduce(waited bytes)) + all_reduce(update bytes)

An all-reduce is a fixed time, a time for each hop, and bytes over bandwidth.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.compiled_step import StepCost

REACHABLE_FLOPS = 0.5
"""Share of the peak FLOP/s that convolutions reach: an assumption."""

REACHABLE_BANDWIDTH = 0.8
"""Share of the memory's bandwidth that a program reaches: an assumption."""


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """An accelerator and what connects many of them.

  Devices within an island have the fast interconnect; islands have a network.

  Attributes:
    name: its name.
    flops: peak FLOP/s in bfloat16.
    memory_bandwidth: bytes/s.
    memory_bytes: bytes.
    host_devices: devices of a host.
    shapes: shape of the torus by the number of devices of a slice; None: a switch
      connects the devices of an island.
    island: devices of the largest island.
    link_bandwidth: bytes/s that a device sends over one link in one direction: along
      an axis of the torus, or into the switch.
    wraps: sizes of a torus' axis whose ends are connected.
    base_seconds: time of an all-reduce without data and hops.
    hop_seconds: time of a hop in the island.
    network_bandwidth: bytes/s that a device sends to other islands.
    network_hop_seconds: time of a hop between islands.
  """

  name: str
  flops: float
  memory_bandwidth: float
  memory_bytes: float
  host_devices: int
  shapes: Mapping[int, tuple[int, ...]] | None
  island: int
  link_bandwidth: float
  wraps: tuple[int, ...]
  base_seconds: float
  hop_seconds: float
  network_bandwidth: float
  network_hop_seconds: float


# "How to Scale Your Model" (Austin et al., 2025, jax-ml.github.io/scaling-book) has a
# hop at 1 us, and a measured all-gather of three hops that takes 8 us.
_TPU_HOP = 1e-6
_TPU_BASE = 5e-6
# The same book: 25 GB/s a host between pods. The latency is our assumption.
_DCN_HOST = 25e9
_DCN_HOP = 20e-6
_SHAPES_2D = {1: (1,), 4: (2, 2), 16: (4, 4), 64: (8, 8), 256: (16, 16)}
_SHAPES_3D = {
  1: (1,),
  4: (2, 2),
  16: (2, 2, 4),
  64: (4, 4, 4),
  256: (4, 8, 8),
  1024: (8, 8, 16),
}

# Peak, memory and pods: cloud.google.com/tpu/docs/v4, /v5e and /v6e. Bandwidth of a
# link: the book above. NVIDIA's H100 data sheet (SXM, dense bfloat16, 900 GB/s NVLink
# in both directions together), one 400 Gb/s port of InfiniBand a GPU (DGX H100), and
# the latencies of NCCL's own cost model (src/graph/tuning.cc: tree, protocol LL).
ACCELERATORS = (
  Accelerator(
    name="TPU v4",
    flops=275e12,
    memory_bandwidth=1200e9,
    memory_bytes=32 * 2**30,
    host_devices=4,
    shapes=_SHAPES_3D,
    island=4096,
    link_bandwidth=45e9,
    wraps=(4, 8, 16),
    base_seconds=_TPU_BASE,
    hop_seconds=_TPU_HOP,
    network_bandwidth=_DCN_HOST / 4,
    network_hop_seconds=_DCN_HOP,
  ),
  Accelerator(
    name="TPU v5e",
    flops=197e12,
    memory_bandwidth=819e9,
    memory_bytes=16e9,
    host_devices=8,
    shapes=_SHAPES_2D,
    island=256,
    link_bandwidth=50e9,
    wraps=(16,),
    base_seconds=_TPU_BASE,
    hop_seconds=_TPU_HOP,
    network_bandwidth=_DCN_HOST / 8,
    network_hop_seconds=_DCN_HOP,
  ),
  Accelerator(
    name="TPU v6e",
    flops=918e12,
    memory_bandwidth=1638e9,
    memory_bytes=32e9,
    host_devices=8,
    shapes=_SHAPES_2D,
    island=256,
    link_bandwidth=100e9,
    wraps=(16,),
    base_seconds=_TPU_BASE,
    hop_seconds=_TPU_HOP,
    network_bandwidth=_DCN_HOST / 8,
    network_hop_seconds=_DCN_HOP,
  ),
  Accelerator(
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
  ),
)


def all_reduce_seconds(
  accelerator: Accelerator, num_devices: int, num_bytes: float
) -> float:
  """Returns the time of one all-reduce.

  On a torus it is a reduce-scatter and an all-gather along every axis at once, each
  in both directions. Behind a switch the hops are those of NCCL's tree: a chain within
  the host, both ways. Between islands, each device exchanges its share of the sum with
  those at its place in the others, in a tree.

  Args:
    accelerator: the accelerator.
    num_devices: devices that sum, a power of four.
    num_bytes: bytes of the sum.
  """
  if num_devices == 1:
    return 0.0
  inner = min(num_devices, accelerator.island)
  islands = num_devices // inner
  if accelerator.shapes is None:
    hops = 2 * (inner - 1)
    bandwidth = accelerator.link_bandwidth
  else:
    hops, bandwidth = 0, 0.0
    for size in accelerator.shapes[inner]:
      wraps = size in accelerator.wraps
      hops += 2 * (size // 2 if wraps else size - 1)
      # At the end of an axis that does not wrap, there is one link.
      bandwidth += (2 if wraps else 1) * accelerator.link_bandwidth
  seconds = accelerator.base_seconds + hops * accelerator.hop_seconds
  seconds += 2 * (inner - 1) / inner * num_bytes / bandwidth
  if islands > 1:
    seconds += 2 * math.log2(islands) * accelerator.network_hop_seconds
    share = num_bytes / inner
    seconds += 2 * (islands - 1) / islands * share / accelerator.network_bandwidth
  return seconds


class StepTime(NamedTuple):
  """Where the time of a step goes, in seconds.

  Attributes:
    local: computation and memory.
    waiting: all-reduces within forward and backward pass.
    update: the all-reduce of the gradients, behind them.
  """

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
    accelerator: the accelerator.
    num_devices: devices that share the batch, a power of four.
    parts: parts of the batch whose gradients are added up one after the other.
  """
  compute = cost.flops / (REACHABLE_FLOPS * accelerator.flops)
  memory = cost.num_bytes / (REACHABLE_BANDWIDTH * accelerator.memory_bandwidth)
  waiting = sum(
    all_reduce_seconds(accelerator, num_devices, num_bytes)
    for num_bytes in cost.waited_bytes
  )
  return StepTime(
    local=parts * max(compute, memory),
    waiting=parts * waiting,
    update=all_reduce_seconds(accelerator, num_devices, cost.update_bytes),
  )
