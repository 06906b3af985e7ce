r"""Trains and evaluates one network.

Example:
  python -m experiments.train --workdir=/tmp/run --config.depth=100

On several hosts, the same on each of them with its own number:
  python -m experiments.train --workdir=/shared/run --coordinator_address=host0:8476 \
    --num_processes=2 --process_id=0
"""

from experiments import program, protocols
from skipinit_jax import document
from skipinit_jax.training import TrainConfig, distributed, train

CONFIGS = {
  # Embedded 8x8 images: a minute on a CPU.
  "digits": TrainConfig,
  "fashion_mnist": protocols.fashion_mnist,
  "cifar10": protocols.cifar10,
  "cifar100": protocols.cifar100,
  "imagenet2012": protocols.imagenet,
}

_WORKDIR = program.define_workdir(
  "checkpoints, metrics.jsonl and result.json", in_bucket=True
)
_CONFIG = program.define_config(CONFIGS, default="digits")
_join_processes = program.define_processes()
_STATUSES = {
  "completed": 0,
  "diverged": program.DIVERGED_STATUS,
  "interrupted": program.INTERRUPTED_STATUS,
}


def main() -> int:
  """Runs the program."""
  _join_processes()
  workdir = _WORKDIR.value
  result = train(_CONFIG.value, workdir, command=document.command_line())
  if not distributed.is_first():
    return _STATUSES[result.status]
  if result.test_accuracy is not None:
    print(
      f"Test accuracy {100 * result.test_accuracy:.2f} %, test loss "
      f"{result.test_loss:.4f} after {result.step} steps."
    )
    if result.test_ema_accuracy is not None:
      print(
        f"With averaged parameters: test accuracy {100 * result.test_ema_accuracy:.2f} "
        f"%, test loss {result.test_ema_loss:.4f}."
      )
  elif result.status == "diverged":
    print(f"Diverged: the loss or a parameter is not finite after step {result.step}.")
  elif result.step == 0:
    print("Interrupted before the first step: the same command starts again.")
  else:
    print(f"Interrupted and saved at step {result.step}: the same command resumes it.")
  print(f"Results: {workdir}/result.json, metrics: {workdir}/metrics.jsonl")
  return _STATUSES[result.status]


if __name__ == "__main__":
  program.run(main)
