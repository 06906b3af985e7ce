"""Training: configuration, optimizer, sharded step, checkpoints and the loop."""

from skipinit_jax.training import distributed
from skipinit_jax.training.checkpoints import Checkpoints
from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.loop import Result, train
from skipinit_jax.training.mesh import batch_sharding, make_mesh, replicated
from skipinit_jax.training.optimizer import make_optimizer
from skipinit_jax.training.state import (
  EpochMetrics,
  Keys,
  TrainState,
  make_init,
  state_sharding,
)
from skipinit_jax.training.step import (
  EvalMetrics,
  make_evaluate,
  make_train_step,
  make_train_steps,
)
from skipinit_jax.training.stop import StopRequest
from skipinit_jax.training.trained import Trained, load_trained
from skipinit_jax.training.trainer import Trainer
from skipinit_jax.training.transformations import parameter_roles
from skipinit_jax.training.weights import Weights, load_weights

__all__ = [
  "Checkpoints",
  "EpochMetrics",
  "EvalMetrics",
  "Keys",
  "Result",
  "StopRequest",
  "TrainConfig",
  "TrainState",
  "Trained",
  "Trainer",
  "Weights",
  "batch_sharding",
  "distributed",
  "load_trained",
  "load_weights",
  "make_evaluate",
  "make_init",
  "make_mesh",
  "make_optimizer",
  "make_train_step",
  "make_train_steps",
  "parameter_roles",
  "replicated",
  "state_sharding",
  "train",
]
