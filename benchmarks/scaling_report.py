"""Costs of steps, and the tables and figures of what they take on TPUs and GPUs."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import compiled_step, scaling_model
from benchmarks.compiled_step import StepCost
from benchmarks.scaling_model import ACCELERATORS, Accelerator, StepTime, step_time
from skipinit_jax import document
from skipinit_jax.analysis import figures
from skipinit_jax.errors import UsageError
from skipinit_jax.files import write_json
from skipinit_jax.training import TrainConfig

GLOBAL_BATCH = 4096
"""Images of a step where the batch of all devices is fixed."""

DEVICES = (1, 4, 16, 64, 256, 1024)
"""Numbers of devices, of which every torus here can be made."""

_BATCHES = (4, 16, 64, 256)
_SMALL_BATCH, _BATCH = 4, 64
_TOPOLOGY = "v5e:2x4"
_SHARES = (0.2, 0.05)
_TITLES = {"batch_norm": "Batch norm", "skipinit": "SkipInit"}


class Network(NamedTuple):
  """A network and its images.

  Attributes:
    config: fields of `TrainConfig`.
    image_shape: height, width and channels.
    num_classes: number of logits.
  """

  config: Mapping[str, Any]
  image_shape: tuple[int, int, int]
  num_classes: int


_NETWORKS = {
  "ResNet-50": Network({"model": "resnet", "depth": 50}, (224, 224, 3), 1000),
  **{
    f"Wide-ResNet {depth}-{width}": Network(
      {"model": "wide_resnet", "depth": depth, "width": width}, (32, 32, 3), 10
    )
    for depth, width in ((16, 4), (28, 10))
  },
}


class Key(NamedTuple):
  """What a cost is of.

  Attributes:
    network: a title, such as "ResNet-50".
    method: "batch_norm" or "skipinit".
    batch: images of a device.
  """

  network: str
  method: str
  batch: int


Costs = Mapping[Key, StepCost]


def read_costs(workdir: str | os.PathLike[str]) -> dict[Key, StepCost]:
  """Returns the costs of a folder's costs.json, in the order of the networks.

  Args:
    workdir: the folder.

  Raises:
    UsageError: there is no such file.
  """
  path = pathlib.Path(workdir, "costs.json")
  if not path.exists():
    raise UsageError(f"--workdir has no {path.name}: make it with --count.")
  costs = {}
  for row in json.loads(path.read_text(encoding="utf-8")):
    key = Key(*(row.pop(name) for name in Key._fields))
    costs[key] = StepCost(**row | {"waited_bytes": tuple(row["waited_bytes"])})
  return {key: costs[key] for key in _wanted() if key in costs}


def count_missing(workdir: pathlib.Path) -> None:
  """Compiles the steps that costs.json lacks; writes it after each.

  Args:
    workdir: its folder; made if it does not exist.
  """
  # With libtpu installed, JAX would otherwise look for a TPU to run on.
  jax.config.update("jax_platforms", "cpu")
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / "costs.json"
  costs = read_costs(workdir) if path.exists() else {}
  devices = compiled_step.tpu_devices(_TOPOLOGY)
  for key in _wanted():
    if key in costs:
      continue
    print(f"Compiling {', '.join(map(str, key))}", file=sys.stderr)
    network = _NETWORKS[key.network]
    config = TrainConfig(
      **network.config,
      method=key.method,
      scan=False,
      dtype="bfloat16",
      batch_size=key.batch * len(devices),
    )
    costs[key] = compiled_step.count(
      config, network.image_shape, network.num_classes, devices
    )
    rows = [key._asdict() | dataclasses.asdict(cost) for key, cost in costs.items()]
    write_json(path, rows)


def _wanted() -> Iterator[Key]:
  for network in _NETWORKS:
    for method in ("batch_norm", "skipinit"):
      yield Key(network, method, _BATCH)
  for method in ("batch_norm", "skipinit"):
    yield Key("ResNet-50", method, _SMALL_BATCH)


def resnet_cost(costs: Costs, method: str, batch: int) -> StepCost:
  """Returns what a device does in ResNet-50's step with any batch.

  FLOPs and bytes are taken as linear in the batch: a fixed part, such as the
  parameters' update, and a part for each image.

  Args:
    costs: of ResNet-50 with both batches that are compiled.
    method: "batch_norm" or "skipinit".
    batch: images of a device.
  """
  small = costs[Key("ResNet-50", method, _SMALL_BATCH)]
  usual = costs[Key("ResNet-50", method, _BATCH)]
  weight = (batch - _SMALL_BATCH) / (_BATCH - _SMALL_BATCH)

  def at_batch(small: float, usual: float) -> float:
    return small + weight * (usual - small)

  # The collectives are the same with any batch.
  return dataclasses.replace(
    usual,
    flops=at_batch(small.flops, usual.flops),
    num_bytes=at_batch(small.num_bytes, usual.num_bytes),
    memory_bytes=round(at_batch(small.memory_bytes, usual.memory_bytes)),
  )


def make_tables(costs: Costs) -> dict[str, document.Table]:
  """Returns the tables by name: those of docs/scaling.md.

  Args:
    costs: of every key that the tables need.
  """
  tables = (
    _cost_table(costs),
    _accelerator_table(),
    _latency_table(),
    _share_table(costs),
    _strong_table(costs),
    _network_table(costs),
    _sensitivity_table(costs),
  )
  return {table.name: table for table in tables}


def make_document(costs: Costs) -> document.Document:
  """Returns the report.

  Args:
    costs: of every key that the tables need.
  """
  tables = make_tables(costs)
  return document.Document(
    title="Scaling: a model of the training step",
    lead="How long a step takes on 1 to 1024 accelerators, and where batch norm's "
    "synchronization costs: a model on the compiled program's own costs. Nothing here "
    "was measured on an accelerator.",
    findings=_findings(costs),
    sections=[
      document.Section(
        "Costs and hardware",
        "",
        [tables["costs"], tables["accelerators"], tables["latency"]],
      ),
      document.Section(
        "Batch norm's synchronization",
        "",
        [
          tables["waiting_share"],
          _share_figure(costs),
          tables["networks"],
          tables["sensitivity"],
        ],
      ),
      document.Section(
        f"A batch of {GLOBAL_BATCH} images",
        "",
        [tables["strong_scaling"], _strong_figure(costs)],
      ),
    ],
    config={
      "reachable_flops": scaling_model.REACHABLE_FLOPS,
      "reachable_bandwidth": scaling_model.REACHABLE_BANDWIDTH,
      "accelerators": {each.name: dataclasses.asdict(each) for each in ACCELERATORS},
    },
    versions={
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "flax", "optax")
    },
    device="none: compiled for TPU v5e, and modelled",
    command="python -m benchmarks.scaling --workdir=results/scaling",
  )


def _cost_table(costs: Costs) -> document.Table:
  rows = []
  for key, cost in costs.items():
    if key.batch != _BATCH:
      continue
    rows.append(
      [
        f"{key.network}, {_TITLES[key.method]}",
        f"{cost.parameters / 1e6:.2f}",
        f"{cost.flops / key.batch / 1e9:.2f}",
        f"{cost.num_bytes / key.batch / 1e6:.0f}",
        f"{cost.memory_bytes / 1e9:.1f}",
        str(len(cost.waited_bytes)),
        f"{(sum(cost.waited_bytes) + cost.update_bytes) / 1e6:.1f}",
      ]
    )
  return document.Table(
    name="costs",
    title="What one device does in a step of 64 images a device, as compiled",
    header=[
      "network and method",
      "million parameters",
      "GFLOP/image",
      "MB/image",
      "GB of memory",
      "all-reduces waited for",
      "MB all-reduced",
    ],
    rows=rows,
  )


def _accelerator_table() -> document.Table:
  rows = [
    [
      each.name,
      f"{each.flops / 1e12:.0f}",
      f"{each.memory_bandwidth / 1e9:.0f}",
      f"{each.memory_bytes / 1e9:.0f}",
      str(each.island),
      f"{each.link_bandwidth / 1e9:.0f}",
      f"{each.network_bandwidth / 1e9:.1f}",
      str(each.host_devices),
    ]
    for each in ACCELERATORS
  ]
  return document.Table(
    name="accelerators",
    title="The accelerators, as the model has them",
    header=[
      "accelerator",
      "TFLOP/s (bfloat16)",
      "memory GB/s",
      "memory GB",
      "devices of an island",
      "GB/s a link and direction",
      "GB/s to other islands",
      "devices of a host",
    ],
    rows=rows,
  )


def _latency_table() -> document.Table:
  rows = []
  for each in ACCELERATORS:
    times = (scaling_model.all_reduce_seconds(each, n, 2048) for n in DEVICES[1:])
    rows.append([each.name, *(f"{1e6 * time:.0f}" for time in times)])
  return document.Table(
    name="latency",
    title="Time of a small all-reduce (2 KB) in microseconds, by devices",
    header=["accelerator", *map(str, DEVICES[1:])],
    rows=rows,
  )


def _share_table(costs: Costs) -> document.Table:
  rows = []
  for accelerator in ACCELERATORS:
    for num_devices in DEVICES[1:]:
      times = {
        batch: step_time(
          resnet_cost(costs, "batch_norm", batch), accelerator, num_devices
        )
        for batch in _BATCHES
      }
      rows.append(
        [
          f"{accelerator.name}, {num_devices}",
          *(f"{time.waiting_share:.0%}" for time in times.values()),
          *(_first_batch(times, share) for share in _SHARES),
        ]
      )
  return document.Table(
    name="waiting_share",
    title="ResNet-50 with batch norm: share of the step that its all-reduces take, by "
    "images of a device",
    header=[
      "accelerator, devices",
      *map(str, _BATCHES),
      *(f"below {share:.0%} from" for share in _SHARES),
    ],
    rows=rows,
  )


def _first_batch(times: Mapping[int, StepTime], share: float) -> str:
  """Returns from how many images of a device on a share of the step is below."""
  batches = np.array(list(times), float)
  local = np.array([time.local for time in times.values()])
  others = times[_BATCHES[0]]
  # waiting / (local + waiting + update) = share
  wanted = others.waiting * (1 / share - 1) - others.update
  if wanted <= local[0]:
    return f"≤ {_BATCHES[0]}"
  if wanted > local[-1]:
    return f"> {_BATCHES[-1]}"
  return f"{np.interp(wanted, local, batches):.0f}"


def _strong_table(costs: Costs) -> document.Table:
  rows = []
  for accelerator in ACCELERATORS:
    for num_devices in DEVICES:
      batch_norm, skipinit = (
        _strong(costs, method, accelerator, num_devices)
        for method in ("batch_norm", "skipinit")
      )
      rate = GLOBAL_BATCH / skipinit.total
      hosts = max(1, num_devices // accelerator.host_devices)
      rows.append(
        [
          f"{accelerator.name}, {num_devices}",
          str(min(GLOBAL_BATCH // num_devices, _BATCHES[-1])),
          *(
            f"{1e3 * part:.1f}"
            for part in (batch_norm.local, batch_norm.waiting, batch_norm.update)
          ),
          f"{1e3 * batch_norm.total:.1f}",
          f"{1e3 * skipinit.total:.1f}",
          f"{batch_norm.total / skipinit.total:.2f}",
          f"{rate:,.0f}",
          f"{rate / hosts:,.0f}",
        ]
      )
  return document.Table(
    name="strong_scaling",
    title=f"ResNet-50, {GLOBAL_BATCH} images a step on all devices together: "
    "milliseconds, and images/s for SkipInit",
    header=[
      "accelerator, devices",
      "images a device",
      "batch norm: local",
      "waiting",
      "gradients",
      "step",
      "SkipInit: step",
      "SkipInit is faster by",
      "images/s",
      "images/s a host",
    ],
    rows=rows,
  )


def _strong(
  costs: Costs, method: str, accelerator: Accelerator, num_devices: int
) -> StepTime:
  local = GLOBAL_BATCH // num_devices
  # More images at once would not fit, or gain nothing.
  parts = max(1, local // _BATCHES[-1])
  cost = resnet_cost(costs, method, local // parts)
  return step_time(cost, accelerator, num_devices, parts)


def _network_table(costs: Costs) -> document.Table:
  rows = []
  for network, accelerator in itertools.product(_NETWORKS, ACCELERATORS):
    times = [
      step_time(costs[Key(network, method, _BATCH)], accelerator, 256)
      for method in ("batch_norm", "skipinit")
    ]
    batch_norm, skipinit = times
    rows.append(
      [
        f"{network}, {accelerator.name}",
        *(f"{1e3 * time.total:.1f}" for time in times),
        f"{batch_norm.waiting_share:.0%}",
        f"{64 * 256 / skipinit.total:,.0f}",
      ]
    )
  return document.Table(
    name="networks",
    title="64 images a device on 256 devices: milliseconds of a step",
    header=[
      "network and accelerator",
      "batch norm",
      "SkipInit",
      "batch norm waits",
      "images/s (SkipInit)",
    ],
    rows=rows,
  )


def _sensitivity_table(costs: Costs) -> document.Table:
  cost = resnet_cost(costs, "batch_norm", 64)
  factors = (0.25, 0.5, 1, 2)
  rows = []
  for accelerator in ACCELERATORS:
    changed = (
      dataclasses.replace(
        accelerator,
        base_seconds=factor * accelerator.base_seconds,
        hop_seconds=factor * accelerator.hop_seconds,
        network_hop_seconds=factor * accelerator.network_hop_seconds,
      )
      for factor in factors
    )
    shares = (step_time(cost, each, 256).waiting_share for each in changed)
    rows.append([accelerator.name, *(f"{share:.0%}" for share in shares)])
  return document.Table(
    name="sensitivity",
    title="The share for ResNet-50, 64 images a device, 256 devices, if every latency "
    "is so many times the assumed one",
    header=["accelerator", *(f"{factor:g}" for factor in factors)],
    rows=rows,
  )


def _share_figure(costs: Costs) -> document.Figure:
  panels = []
  for batch in (16, 64):
    cost = resnet_cost(costs, "batch_norm", batch)
    lines = {
      each.name: (
        DEVICES[1:],
        np.array([100 * step_time(cost, each, n).waiting_share for n in DEVICES[1:]]),
      )
      for each in ACCELERATORS
    }
    title = f"% of the step, {batch} images a device"
    panels.append(figures.Panel(title, lines, log_x=True, log_y=False))
  return document.Figure(
    name="waiting_share_by_devices",
    title="Share of ResNet-50's step that batch norm's all-reduces take, by devices",
    figure=figures.line_figure(panels, "devices"),
    description="The share grows with the number of devices on every accelerator, and "
    "is larger with 16 images a device than with 64.",
  )


def _strong_figure(costs: Costs) -> document.Figure:
  panels = []
  for accelerator in ACCELERATORS:
    lines = {
      _TITLES[method]: (
        DEVICES,
        np.array([1e3 * _strong(costs, method, accelerator, n).total for n in DEVICES]),
      )
      for method in ("batch_norm", "skipinit")
    }
    panels.append(figures.Panel(f"ms of a step, {accelerator.name}", lines, log_x=True))
  return document.Figure(
    name="strong_scaling_steps",
    title=f"Step of ResNet-50 with {GLOBAL_BATCH} images on all devices together",
    figure=figures.line_figure(panels, "devices"),
    description="Four panels, one an accelerator. The step of SkipInit becomes shorter "
    "with every fourfold of the devices for longer than that of batch norm.",
  )


def _findings(costs: Costs) -> list[document.Finding]:
  waits = {key: len(cost.waited_bytes) for key, cost in costs.items()}
  # One before each convolution of a branch, and one before the classifier.
  normalizers = {
    name: 49 if name == "ResNet-50" else network.config["depth"] - 3
    for name, network in _NETWORKS.items()
  }
  expected = {
    key: 2 * normalizers[key.network] if key.method == "batch_norm" else 0
    for key in waits
  }
  wrong = [", ".join(map(str, key)) for key in waits if waits[key] != expected[key]]
  return [
    document.Finding(
      "Forward and backward pass wait for two all-reduces a normalizer with batch "
      "norm, and for none with SkipInit.",
      not wrong,
      f"{len(waits)} compiled steps"
      + (f"; not so: {'; '.join(wrong)}." if wrong else "."),
    )
  ]


def numbers(costs: Costs) -> dict[str, Any]:
  """Returns what scaling.json holds: seconds of every step of the tables.

  Args:
    costs: of the steps.
  """
  weak = [
    {
      **key._asdict(),
      "accelerator": accelerator.name,
      "devices": num_devices,
      **step_time(cost, accelerator, num_devices)._asdict(),
    }
    for key, cost in costs.items()
    for accelerator, num_devices in itertools.product(ACCELERATORS, DEVICES)
  ]
  strong = [
    {
      "method": method,
      "accelerator": accelerator.name,
      "devices": num_devices,
      **_strong(costs, method, accelerator, num_devices)._asdict(),
    }
    for method in ("batch_norm", "skipinit")
    for accelerator, num_devices in itertools.product(ACCELERATORS, DEVICES)
  ]
  return {"batch_per_device_fixed": weak, "batch_of_all_devices_fixed": strong}
