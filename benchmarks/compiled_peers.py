"""Compares train steps here and in other code as a TPU v5e compiles them, without one.

Each step is compiled ahead of time for one device: forward and backward pass, L2 and
momentum on 64 images, in bfloat16. XLA counts FLOPs and bytes. docs/performance.md has
the table.

The table from the costs in results/compiled_peers/costs.json:
  python -m benchmarks.compiled_peers --workdir=results/compiled_peers

The costs that the file lacks, in up to five minutes of a core each. It needs libtpu of
jax[tpu]'s version, in an environment of its own, because JAX opens a TPU wherever that
is installed; and the extra `peers`, without PyTorch:
  python -m benchmarks.compiled_peers --workdir=results/compiled_peers --count
"""

import dataclasses
import gc
import importlib
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from jax.sharding import SingleDeviceSharding

from benchmarks import benchmark, compiled_step
from benchmarks.peer import Case
from skipinit_jax import document
from skipinit_jax.files import read_json, write_json

_BATCH = 64
_RESNET = Case(50, 0, 224, _BATCH, "batch_norm", dtype="bfloat16", scan=False)
_SKIPINIT = dataclasses.replace(_RESNET, method="skipinit", version=2)
_NF_RESNET = dataclasses.replace(_SKIPINIT, method="nf_resnet")
_WIDE = Case(28, 10, 32, _BATCH, "batch_norm", dtype="bfloat16", scan=False)
_DEEP = [
  Case(depth, 1, 32, _BATCH, "skipinit", dtype="bfloat16", scan=False)
  for depth in (28, 100)
]


def _scanned(case: Case) -> Case:
  return dataclasses.replace(case, scan=True)


_ROWS: Sequence[tuple[str, Case]] = (
  ("peer_jax", _RESNET),
  ("peer_flax", _RESNET),
  ("peer_jax", _SKIPINIT),
  ("peer_haiku", _SKIPINIT),
  ("peer_jax", _NF_RESNET),
  ("peer_haiku", _NF_RESNET),
  ("peer_haiku", _RESNET),
  ("peer_jax", _scanned(_RESNET)),
  ("peer_jax", _scanned(_SKIPINIT)),
  *(
    (peer, dataclasses.replace(_WIDE, method=method))
    for method in ("batch_norm", "skipinit")
    for peer in ("peer_jax", "peer_flax")
  ),
  *(("peer_jax", each) for case in _DEEP for each in (_scanned(case), case)),
)
"""Whose step of which case; what matters most is first."""

_PEERS = {"peer_jax": "skipinit_jax", "peer_flax": "Flax", "peer_haiku": "Haiku"}


def cost_of(peer: str, case: Case, device: Any) -> dict[str, Any]:
  """Compiles a step and returns its row of costs.json.

  Args:
    peer: a module of this folder with `jitted_step`.
  """
  where: Any = [device] if peer == "peer_jax" else SingleDeviceSharding(device)
  step = importlib.import_module(f"benchmarks.{peer}").jitted_step(case, where)
  lowered = step.apply.lower(*step.shapes)
  begin = time.process_time()
  compiled = lowered.compile()
  seconds = time.process_time() - begin
  cost = compiled_step.program_cost(compiled)
  return {
    "peer": peer,
    "case": dataclasses.asdict(case),
    "compile_cpu_seconds": benchmark.digits(seconds),
    **dataclasses.asdict(cost),
  }


def count_missing(path: pathlib.Path) -> None:
  """Compiles the steps that costs.json lacks; writes it after each."""
  # With libtpu installed, JAX would otherwise look for a TPU to run on.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)
  device = compiled_step.tpu_devices("v5e:2x2")[0]
  found = read_json(path)["steps"] if path.exists() else []
  for peer, case in _ROWS:
    if any((row["peer"], Case(**row["case"])) == (peer, case) for row in found):
      continue
    print(f"Compiling {_title(case)} of {_PEERS[peer]}", file=sys.stderr, flush=True)
    found.append(cost_of(peer, case, device))
    write_json(path, {"steps": found, "tables": make_tables(found)})
    gc.collect()


def _title(case: Case) -> str:
  version = "" if case.width else f" v{case.version}"
  return f"{case.network}{version}, {case.method.replace('_', ' ')}"


def make_tables(found: Sequence[dict[str, Any]]) -> dict[str, benchmark.Rows]:
  """Returns the rows of the table, by its name."""
  rows = []
  for peer, case in _ROWS:
    for row in found:
      if (row["peer"], Case(**row["case"])) == (peer, case):
        scan = ", one scan a stage" if case.scan else ""
        rows.append((_title(case), _PEERS[peer] + scan, row))
  # Networks stand together.
  order = {title: index for index, (title, *_) in enumerate(reversed(rows))}
  rows.sort(key=lambda row: -order[row[0]])
  return {
    "compiled_peers": [
      {
        "network": title,
        "step of": peer,
        "GFLOP/image": round(row["flops"] / case_batch(row) / 1e9, 2),
        "MB/image": round(row["num_bytes"] / case_batch(row) / 1e6, 1),
        "MB/image into stacks": round(row["stacking_bytes"] / case_batch(row) / 1e6, 1),
        "MB of memory": round(row["memory_bytes"] / 1e6),
        "core seconds to compile": round(row["compile_cpu_seconds"]),
      }
      for title, peer, row in rows
    ]
  }


def case_batch(row: dict[str, Any]) -> int:
  """Returns the images of a row's step."""
  batch: int = row["case"]["batch_size"]
  return batch


def main() -> None:
  """Prints the table of the costs in a folder."""
  path = pathlib.Path(_WORKDIR.value, "costs.json")
  if _COUNT.value:
    path.parent.mkdir(parents=True, exist_ok=True)
    count_missing(path)
  tables = make_tables(read_json(path)["steps"])
  for table in benchmark.make_tables(tables).values():
    document.print_table(table)


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of costs.json.", required=True
  )
  _COUNT = flags.DEFINE_bool("count", False, "Compile the steps that costs.json lacks.")
  benchmark.run_program(main)
