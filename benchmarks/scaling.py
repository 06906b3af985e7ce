"""Models the time of a training step on 1 to 1024 TPUs or GPUs, batch norm or not.

The costs of a step come from the program that XLA compiles for TPU v5e, which is done
without a TPU; the time comes from `benchmarks.scaling_model`. docs/scaling.md explains
both and has the tables.

Tables from the costs in results/scaling/costs.json:
  python -m benchmarks.scaling --workdir=results/scaling

The costs that the file lacks, in minutes each, with libtpu of jax[tpu]'s version:
  python -m benchmarks.scaling --workdir=results/scaling --count
"""

import dataclasses
import functools
import pathlib
import sys

from benchmarks import benchmark, compiled_step, peer_jax, scaling_model
from benchmarks.peer import Case
from skipinit_jax.files import write_json

_NETWORKS = {
  "ResNet-50": functools.partial(Case, 50, 0, 224, version=2),
  "Wide-ResNet 16-4": functools.partial(Case, 16, 4, 32),
  "Wide-ResNet 28-10": functools.partial(Case, 28, 10, 32),
}


def count_missing(workdir: pathlib.Path) -> None:
  """Compiles the steps that costs.json lacks; writes it after each."""
  path = workdir / "costs.json"
  costs = scaling_model.read_costs(workdir) if path.exists() else {}
  devices = compiled_step.tpu_devices("v5e:2x4")
  for key in scaling_model.KEYS:
    if key in costs:
      continue
    print(f"Compiling {', '.join(map(str, key))}", file=sys.stderr)
    case = _NETWORKS[key.network](
      key.batch * len(devices), key.method, dtype="bfloat16", scan=False
    )
    costs[key] = compiled_step.count(peer_jax.jitted_step(case, devices))
    rows = [key._asdict() | dataclasses.asdict(cost) for key, cost in costs.items()]
    write_json(path, rows)


if __name__ == "__main__":
  benchmark.run_counts(count_missing, scaling_model.read_tables)
