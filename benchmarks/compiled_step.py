"""What one compiled train step computes, moves and sends, from its own program.

The step is compiled for a mesh of devices that need not exist: XLA's cost analysis
counts its operations and bytes, and its text has every collective.
"""

import collections
import dataclasses
import functools
import importlib
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peer import Step
from skipinit_jax import training
from skipinit_jax.compilation import compiler_options
from skipinit_jax.errors import UsageError

_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\(([^)]*)")
_COLLECTIVE = re.compile(
  r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?"
)
_LOOP = re.compile(r" while\(.*? condition=(%[^\s,]+), body=(%[^\s,]+)(.*)")
# What computes besides copying is a fusion of kind kOutput, behind a convolution.
_STACKED = re.compile(r"dynamic-update-slice_fusion\S* = ([a-z]\S+) .*?kind=kLoop")
_STAGED = re.compile(
  r"\s+(?:ROOT )?(?P<name>%\S+) = .*? (?:copy|slice)-start\((?P<operand>%[^\s,)]+)"
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]+|pred)\[([0-9,]*)\]")


@dataclasses.dataclass(frozen=True)
class StepCost:
  """What one device does in one step.

  Attributes:
    flops: floating-point operations; a multiply-add is two.
    num_bytes: bytes that the operations of the compiled program read and write, as in
      `ProgramCost`.
    memory_bytes: bytes of memory that the program needs at once.
    parameters: numbers that are learned.
    waited_bytes: bytes of each collective that other collectives, and so forward or
      backward pass, wait for, in order.
    update_bytes: bytes of the collectives that only the update waits for.
  """

  flops: float
  num_bytes: float
  memory_bytes: int
  parameters: int
  waited_bytes: tuple[int, ...]
  update_bytes: int


@dataclasses.dataclass(frozen=True)
class ProgramCost:
  """What one device does in one run of a compiled program.

  Attributes:
    flops: floating-point operations; a multiply-add is two. The body of a loop counts
      as often as it runs.
    num_bytes: bytes that its operations read and write, of arrays without the padding
      of a device's layouts. What a fused operation keeps to itself is not counted, and
      neither are copies to and from on-chip memory that run beside other operations:
      these read and write what was copied, and count for it.
    memory_bytes: bytes of memory that it needs at once.
    stacking_bytes: bytes that operations read and write which do nothing but copy what
      a turn of a loop has computed into an array of all turns, likewise.
  """

  flops: float
  num_bytes: float
  memory_bytes: int
  stacking_bytes: float


def program_cost(compiled: Any) -> ProgramCost:
  """Returns what a compiled program (`jax.stages.Compiled`) does in one run."""
  memory, text = compiled.memory_analysis(), without_staging(compiled.as_text())
  costs = _all_turns(text)
  return ProgramCost(
    flops=costs["flops"],
    num_bytes=costs["bytes accessed"],
    memory_bytes=memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
    # Each turn copies one slice of the array.
    stacking_bytes=sum(2 * _num_bytes(array) for array in _STACKED.findall(text)),
  )


def without_staging(text: str) -> str:
  """Returns a program's text with the arrays themselves in place of their copies.

  A compiler for TPUs starts a copy, whole or slice by slice, does something else, and
  then reads the copy. In its place stands a bitcast of the original, which is free.
  """
  originals = {}
  lines = []
  for line in text.splitlines():
    if started := _STAGED.match(line):
      originals[started["name"]] = started["operand"]
    elif done := re.match(r"(.*?) (?:copy|slice)-done\((%[^\s,)]+)\)", line):
      lines.append(f"{done[1]} bitcast({originals[done[2]]})")
    elif '"ConcatBitcast"' in line:
      # The slices lie one behind the other.
      lines.append(re.sub(r" custom-call\((%[^\s,)]+).*", r" bitcast(\1)", line))
    else:
      lines.append(line)
  return "\n".join(lines)


def _entry_cost(text: str, entry: str | None = None) -> dict[str, float]:
  """Returns XLA's costs of a program, or of one of its computations alone."""
  # JAX has no public name for either.
  from jax._src.lib import _jax, xla_client

  computations = re.sub(r", metadata=\{[^}]*\}", "", text[text.index("\n%") :])
  if entry is not None:
    computations = computations.replace("\nENTRY %", "\n%", 1)
    computations = computations.replace(f"\n%{entry} (", f"\nENTRY %{entry} (", 1)
  header = "HloModule program, is_scheduled=true\n"
  module = xla_client.hlo.hlo_module_from_text(header + computations)
  client = jax.local_devices(backend="cpu")[0].client
  costs: dict[str, float] = _jax.hlo_module_cost_analysis(client, module)
  return costs


def _all_turns(text: str) -> dict[str, float]:
  """Returns XLA's costs of a program, with all turns of its loops.

  Raises:
    ValueError: nothing in the text says how often a loop runs.
  """
  parts = re.split(r"\n(?=(?:ENTRY )?%\S+ \()", text)
  bodies = {re.sub(r"^ENTRY ", "", part).split(" ", 1)[0]: part for part in parts}

  def add_further(costs: dict[str, float], part: str, times: int = 1) -> None:
    for condition, body, rest in _LOOP.findall(part):
      # XLA says it on a CPU; on a TPU the condition compares with one constant.
      limits = re.findall(r'"known_trip_count":{"n":"(\d+)"', rest) or re.findall(
        r" s32\[\]\S* constant\((\d+)\)", bodies[condition]
      )
      if len(limits) != 1:
        raise ValueError(f"How often does {body} run? Its condition: {limits}")
      turns, once = int(limits[0]), _entry_cost(text, body.removeprefix("%"))
      for name in costs:
        costs[name] += times * (turns - 1) * once[name]
      add_further(costs, bodies[body], times * turns)

  entry = _entry_cost(text)
  costs = {name: entry[name] for name in ("flops", "bytes accessed")}
  add_further(costs, next(part for part in parts if part.startswith("ENTRY ")))
  return costs


def tpu_devices(topology: str) -> Sequence[Any]:
  """Returns devices of a TPU slice to compile for; no TPU is needed.

  Args:
    topology: generation and shape of the slice, such as "v5e:2x4".

  Raises:
    UsageError: the compiler for TPUs is not installed.
  """
  from jax.experimental import topologies

  # With libtpu installed, JAX would otherwise look for a TPU to run on.
  jax.config.update("jax_platforms", "cpu")
  # Otherwise the library looks for the machine's own TPUs, and waits.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # Compilers share what one process alone may drive.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  try:
    importlib.import_module("libtpu")
  except ImportError:
    raise UsageError(
      "--count needs the compiler for TPUs, which runs on any x86 Linux: install "
      "libtpu, in the version that jax[tpu] names."
    ) from None
  return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def make_step(
  config: training.TrainConfig,
  image_shape: tuple[int, ...],
  num_classes: int,
  devices: Sequence[Any],
  *,
  options: bool = True,
) -> Step:
  """Returns the train step of a run as the programs compile it.

  Args:
    config: the run; `batch_size` is that of all devices.
    image_shape: height, width and channels.
    options: whether a CPU compiles it with this package's options.
  """
  mesh = training.make_mesh(devices)
  model = config.make_model(num_classes)
  optimizer = functools.partial(training.make_optimizer, config, 1000)
  init, sharding = training.make_init(model, optimizer, image_shape, mesh=mesh)
  start = np.uint32(config.seed), np.float32(config.learning_rate)
  batch = training.batch_sharding(mesh)
  on_cpu = devices[0].platform == "cpu"
  step = jax.jit(
    training.make_train_step(model, optimizer(), mesh=mesh, sharding=sharding),
    in_shardings=(sharding, batch, batch),
    out_shardings=sharding,
    donate_argnums=0,
    compiler_options=compiler_options() if options and on_cpu else None,
  )
  shapes = (
    jax.eval_shape(init, *start),
    jax.ShapeDtypeStruct((config.batch_size, *image_shape), jnp.float32),
    jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
  )
  return Step(step, shapes, lambda: init(*start))


def count(step: Step) -> StepCost:
  """Compiles a step of `make_step` and returns what each device does in it.

  Its blocks are written out and its batch is whole, so that no loop has a collective:
  see `collective_bytes`.
  """
  # JAX's types allow that a backend has no analyses.
  compiled: Any = step.apply.lower(*step.shapes).compile()
  cost = program_cost(compiled)
  waited_bytes, update_bytes = collective_bytes(compiled.as_text())
  return StepCost(
    flops=cost.flops,
    num_bytes=cost.num_bytes,
    memory_bytes=cost.memory_bytes,
    parameters=sum(leaf.size for leaf in jax.tree.leaves(step.shapes[0].params)),
    waited_bytes=waited_bytes,
    update_bytes=update_bytes,
  )


def collective_bytes(text: str) -> tuple[tuple[int, ...], int]:
  """Returns the bytes that the collectives of a compiled program bring to one device.

  Args:
    text: the program, as `jax.stages.Compiled.as_text` gives it.

  Returns:
    The bytes of the collectives that others wait for, an entry for each place in the
    longest chain of collectives, and the bytes at its end.

  Raises:
    ValueError: a collective is in a computation that the program calls, such as a
      loop, so that nothing tells how often it runs.
  """
  num_bytes: collections.Counter[int] = collections.Counter()
  # How many collectives, one behind the other, each value has waited for.
  waited: collections.Counter[str] = collections.Counter()
  in_entry = False
  for line in text.splitlines():
    if not line.startswith(" "):
      in_entry = line.startswith("ENTRY")
    instruction = _INSTRUCTION.match(line)
    if instruction is None:
      continue
    name, result, operation, operands = instruction.groups()
    is_collective = _COLLECTIVE.fullmatch(operation) is not None
    if in_entry:
      position = max(
        (waited[each] for each in re.findall(r"%([^\s,]+)", operands)), default=0
      )
      waited[name] = position + is_collective
      num_bytes[position] += is_collective * _num_bytes(result)
    elif is_collective:
      raise ValueError(f"A called computation has a collective: {line.strip()[:80]}")
  last = max(waited.values(), default=0)
  *before, end = (num_bytes[position] for position in range(max(1, last)))
  return tuple(before), end


def _num_bytes(shapes: str) -> int:
  total = 0
  for dtype, dimensions in _ARRAY.findall(shapes):
    bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
    sizes = [int(size) for size in dimensions.split(",") if size]
    total += bits // 8 * math.prod(sizes)
  return total
