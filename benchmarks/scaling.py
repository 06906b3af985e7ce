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
import pathlib
import sys
from typing import Any

from benchmarks import benchmark, compiled_step, scaling_model
from skipinit_jax.files import write_json
from skipinit_jax.training import TrainConfig

# What is not a default of each network, height and width of its images, its classes.
_NETWORKS: dict[str, tuple[dict[str, Any], int, int]] = {
  "ResNet-50": ({"model": "resnet", "depth": 50}, 224, 1000),
  "Wide-ResNet 16-4": ({"depth": 16, "width": 4}, 32, 10),
  "Wide-ResNet 28-10": ({"depth": 28, "width": 10}, 32, 10),
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
    network, size, num_classes = _NETWORKS[key.network]
    config = TrainConfig(
      method=key.method,
      dtype="bfloat16",
      batch_size=key.batch * len(devices),
      scan=False,
      **network,
    )
    step = compiled_step.make_step(config, (size, size, 3), num_classes, devices)
    costs[key] = compiled_step.count(step)
    rows = [key._asdict() | dataclasses.asdict(cost) for key, cost in costs.items()]
    write_json(path, rows)


if __name__ == "__main__":
  benchmark.run_counts(count_missing, scaling_model.read_tables)
