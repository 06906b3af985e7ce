"""Training: configuration, optimizer, sharded step, checkpoints and the loop."""

from skipinit_jax.training import compilation, distributed
from skipinit_jax.training.checkpoints import Checkpoints
from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.loop import Result, train
from skipinit_jax.training.mesh import batch_sharding, make_mesh, replicated
from skipinit_jax.training.optimizer import make_optimizer, parameter_roles
from skipinit_jax.training.state import Keys, Sums, TrainState, make_init
from skipinit_jax.training.step import (
  EvalSums,
  make_evaluate,
  make_train_step,
  make_train_steps,
)
from skipinit_jax.training.stop import StopRequest
from skipinit_jax.training.trained import Trained, load_trained

__all__ = [
  "Checkpoints",
  "EvalSums",
  "Keys",
  "Result",
  "StopRequest",
  "Sums",
  "TrainConfig",
  "TrainState",
  "Trained",
  "batch_sharding",
  "compilation",
  "distributed",
  "load_trained",
  "make_evaluate",
  "make_init",
  "make_mesh",
  "make_optimizer",
  "make_train_step",
  "make_train_steps",
  "parameter_roles",
  "replicated",
  "train",
]
