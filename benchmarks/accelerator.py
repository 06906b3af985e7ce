"""Measures this package on one GPU in twelve minutes: `make accelerator`.

In this order: tests that make sense there; throughput of three networks in bfloat16
beside PyTorch (channels-last, torch.compile) and plain Flax; networks of 1000 layers;
as much of a depth study on Fashion-MNIST as the time allows. Each part is a process of
its own with a time limit of its own. It has the GPU to itself, but for the peers of
`benchmarks.depth`, so JAX takes memory only as it needs it. A part that fails or is
stopped is recorded, and the next one begins. The results are written after each part.

Nothing is downloaded. The environment needs CUDA builds of JAX and PyTorch, a C
compiler for torch.compile, and the extra `all` with pytest and pytest-timeout.
Fashion-MNIST comes from the four IDX files in --fashion_mnist, by default where
Debian's package dataset-fashion-mnist has them. What is missing fails its part alone.

Examples:
  python -m benchmarks.accelerator
  python -m benchmarks.accelerator --smoke --workdir=/tmp/smoke --output=/tmp/smoke.json
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from benchmarks import benchmark, side_by_side
from benchmarks.peer import Case
from skipinit_jax.files import write_json

_ROOT = pathlib.Path(__file__).parents[1]
_SECONDS = 12 * 60.0
_TAIL = 3000
# A study saves its runs meanwhile.
_GRACE_SECONDS = 20.0

_CASES = (
  Case(16, 4, 32, 256, "skipinit", dtype="bfloat16"),
  Case(28, 10, 32, 256, "skipinit", dtype="bfloat16"),
  Case(50, 0, 224, 256, "batch_norm", dtype="bfloat16"),
)
_SMOKE_CASES = (Case(10, 1, 8, 8, "skipinit", dtype="bfloat16"),)
_PEERS = {
  peer.name: peer
  for peer in (
    side_by_side.SKIPINIT_JAX,
    side_by_side.TORCH_COMPILE,
    side_by_side.FLAX,
  )
}
_TESTS = (
  "tests/layers",
  "tests/models/test_blocks.py",
  "tests/models/test_normalizer_free.py",
  "tests/models/test_resnet.py",
  "tests/models/test_wide_resnet.py",
  "tests/training/test_step.py",
)
_DESCRIBE = (
  "import json, jax; from benchmarks import benchmark; print(json.dumps("
  "{'device': jax.devices()[0].device_kind, **benchmark.machine()}))"
)


@dataclasses.dataclass(frozen=True)
class Part:
  """One process.

  Attributes:
    name: in the results.
    seconds: after so many it is stopped.
    command: arguments of Python.
  """

  name: str
  seconds: float
  command: Sequence[str]


def plan(workdir: pathlib.Path, fashion_mnist: str, *, smoke: bool) -> list[Part]:
  """Returns the parts, in order.

  Args:
    workdir: where the study has its runs and its data.
    fashion_mnist: the folder with the four IDX files.
    smoke: whether to do the least of each, on any machine.
  """
  tests = ["--collect-only", *_TESTS[:1]] if smoke else _TESTS
  parts = [
    Part("machine", 60, ["-c", _DESCRIBE]),
    Part("tests", 120, ["-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *tests]),
  ]
  for case in _SMOKE_CASES if smoke else _CASES:
    for peer in [side_by_side.SKIPINIT_JAX.name] if smoke else _PEERS:
      what = json.dumps([peer, dataclasses.asdict(case)])
      command = ["-m", "benchmarks.accelerator", f"--alone={what}"]
      parts.append(Part(f"{case.network}, {peer}", 60, command))
  depth = ["--depth=10", "--depths=10"] if smoke else ["--depths=1000"]
  data, study = (str(workdir / name) for name in ("data", "depth_study"))
  fields = {
    "wide_resnet_depths": "(16,)" if smoke else "(16, 100)",
    "wide_resnet.data_dir": repr(data),
    "wide_resnet.epochs": 1 if smoke else 4,
    "wide_resnet.constant_epochs": 0.5 if smoke else 2,
    "wide_resnet.halve_every_epochs": 0.25 if smoke else 0.5,
    "wide_resnet.eval_every_epochs": 1,
  }
  program = ["-m", "experiments.prepare_data", "--dataset=fashion_mnist"]
  return [
    *parts,
    Part("depth", 100, ["-m", "benchmarks.depth", "--rounds=1", "--noflax", *depth]),
    Part("data", 60, [*program, f"--source={fashion_mnist}", f"--data_dir={data}"]),
    Part(
      "depth study",
      _SECONDS,
      [
        *("-m", "experiments.depth_study", f"--workdir={study}"),
        "--config=fashion_mnist",
        *(f"--config.{name}={value}" for name, value in fields.items()),
      ],
    ),
    Part(
      "report",
      60,
      ["-m", "experiments.report", f"--workdir={study}", f"--output={study}/report"],
    ),
  ]


def run_parts(parts: Sequence[Part], path: pathlib.Path, seconds: float) -> bool:
  """Runs the parts and writes what came of each to a JSON file.

  Args:
    path: the file, which is written after each part.
    seconds: for all together; a part that begins late has less, and leaves the last
      part its own.

  Returns:
    Whether all came to their end.
  """
  found: list[dict[str, Any]] = []
  end = time.monotonic() + seconds
  for index, part in enumerate(parts):
    kept = sum(last.seconds for last in parts[index + 1 :][-1:])
    limit = min(part.seconds, end - time.monotonic() - kept)
    print(f"{part.name}: at most {max(0.0, limit):.0f} s", file=sys.stderr, flush=True)
    found.append(_run(part, limit))
    write_json(path, {"parts": found})
  return all(each["outcome"] == "done" for each in found)


def _run(part: Part, limit: float) -> dict[str, Any]:
  if limit <= 0:
    return {"part": part.name, "outcome": "not begun: no time was left"}
  places = filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])
  settings = {
    "PYTHONPATH": os.pathsep.join(places),
    # Otherwise the first JAX takes most of the GPU from PyTorch beside it.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # Tests run on CPUs otherwise, and compare numbers of 32 bits.
    "TEST_PLATFORMS": "",
  }
  if part.name == "tests":
    settings["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
  begin = time.monotonic()
  with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
    process = subprocess.Popen(
      [sys.executable, *part.command],
      cwd=_ROOT,
      env={**os.environ, **settings},
      stdin=subprocess.DEVNULL,
      stdout=output,
      stderr=errors,
      # What it started ends with it.
      start_new_session=True,
    )
    try:
      status = process.wait(limit)
      outcome = "done" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
      outcome = f"stopped after {limit:.0f} s"
      process.terminate()
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(min(_GRACE_SECONDS, limit))
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
    output.seek(0)
    errors.seek(0)
    printed, told = output.read(), errors.read()
  result = None
  with contextlib.suppress(ValueError):
    result = json.loads(printed)
  return {
    "part": part.name,
    "outcome": outcome,
    "seconds": round(time.monotonic() - begin, 1),
    "result": result,
    "output": "" if result and outcome == "done" else (printed + told)[-_TAIL:],
  }


def alone(what: str) -> dict[str, Any]:
  """Measures one peer on one case, `[name, fields]` in JSON, with nothing beside it."""
  name, fields = json.loads(what)
  case = Case(**fields)
  (measured,) = side_by_side.measure(case, [_PEERS[name]], rounds=2).values()
  step = measured.step_seconds["median"]
  row = {
    "network and peer": f"{case.network}, {case.method}, {name}",
    "images/s": benchmark.digits(case.batch_size / step),
    "TFLOP/s": benchmark.digits(case.step_flops / step / 1e12),
    "seconds a step": measured.step_seconds,
    "seconds to first step": measured.seconds_to_first_step,
    "peak GB": measured.peak_gigabytes,
  }
  return {"tables": {"accelerator": [row]}}


def main() -> None:
  """Runs the plan; ends with status 1 if a part failed or was stopped."""
  if _ALONE.value is not None:
    print(json.dumps(alone(_ALONE.value)))
    return
  workdir, output = (pathlib.Path(each.value).resolve() for each in (_WORKDIR, _OUTPUT))
  output.parent.mkdir(parents=True, exist_ok=True)
  parts = plan(workdir, _FASHION_MNIST.value, smoke=_SMOKE.value)
  if not run_parts(parts, output, _SECONDS):
    sys.exit(f"error: not every part came to its end: see {output}.")


if __name__ == "__main__":
  _WORKDIR = flags.DEFINE_string(
    "workdir", "runs/accelerator", "Directory of the study and its data."
  )
  _OUTPUT = flags.DEFINE_string(
    "output", "results/accelerator/accelerator.json", "The file of results."
  )
  _FASHION_MNIST = flags.DEFINE_string(
    "fashion_mnist",
    "/usr/share/datasets/fashion-mnist",
    "Directory of the IDX files of Fashion-MNIST.",
  )
  _SMOKE = flags.DEFINE_bool("smoke", False, "Do the least of each part, anywhere.")
  _ALONE = flags.DEFINE_string("alone", None, "For the program itself: one peer.")
  benchmark.run_program(main)
