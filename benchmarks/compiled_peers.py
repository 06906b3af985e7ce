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
from jax.sharding import SingleDeviceSharding

from benchmarks import benchmark, compiled_step
from benchmarks.peer import Case
from skipinit_jax.document import Table
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


def count_missing(workdir: pathlib.Path) -> None:
  """Compiles the steps that costs.json lacks; writes it after each."""
  path = workdir / "costs.json"
  jax.config.update("jax_enable_compilation_cache", False)
  device = compiled_step.tpu_devices("v5e:2x2")[0]
  found = read_json(path)["steps"] if path.exists() else []
  counted = _by_step(found)
  for peer, case in _ROWS:
    if (peer, case) in counted:
      continue
    print(f"Compiling {_title(case)} of {_PEERS[peer]}", file=sys.stderr, flush=True)
    found.append(cost_of(peer, case, device))
    write_json(path, {"steps": found, "tables": make_tables(found)})
    gc.collect()


def _by_step(found: Sequence[dict[str, Any]]) -> dict[tuple[str, Case], dict[str, Any]]:
  return {(row["peer"], Case(**row["case"])): row for row in found}


def _title(case: Case) -> str:
  version = "" if case.width else f" v{case.version}"
  return f"{case.network}{version}, {case.method.replace('_', ' ')}"


def make_tables(found: Sequence[dict[str, Any]]) -> dict[str, benchmark.Rows]:
  """Returns the rows of the table, by its name."""
  counted = _by_step(found)
  steps = [step for step in _ROWS if step in counted]
  # Networks stand together.
  titles = [_title(case) for _, case in steps]
  steps.sort(key=lambda step: titles.index(_title(step[1])))
  rows = []
  for peer, case in steps:
    row = counted[peer, case]
    rows.append(
      {
        "network": _title(case),
        "step of": _PEERS[peer] + (", one scan a stage" if case.scan else ""),
        "GFLOP/image": round(row["flops"] / case.batch_size / 1e9, 2),
        "MB/image": round(row["num_bytes"] / case.batch_size / 1e6, 1),
        "MB/image into stacks": round(row["stacking_bytes"] / case.batch_size / 1e6, 1),
        "MB of memory": round(row["memory_bytes"] / 1e6),
        "core seconds to compile": round(row["compile_cpu_seconds"]),
      }
    )
  return {"compiled_peers": rows}


def read_tables(workdir: pathlib.Path) -> dict[str, Table]:
  """Returns the table of a folder's costs.json, by its name."""
  return benchmark.make_tables(make_tables(read_json(workdir / "costs.json")["steps"]))


if __name__ == "__main__":
  benchmark.run_counts(count_missing, read_tables)
