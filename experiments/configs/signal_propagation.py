"""Typed default configurations of signal propagation."""

import dataclasses
from collections.abc import Callable

from skipinit_jax import data
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.training.config import MODELS

LINEAR = "linear_mlp"
NOISE = "noise"


@dataclasses.dataclass
class SignalConfig:
  """Networks of one kind and depth, and the batch that passes through them.

  Attributes:
    model: wide_resnet, resnet, residual_mlp, or linear_mlp: fully connected without
      activation.
    depth: layers; blocks of a fully connected network.
    width: factor on the features of a wide_resnet, features of a fully connected
      network.
    version: 1 (post-activation) or 2 (pre-activation), of a resnet.
    layers_per_block: layers of one branch of a fully connected network.
    methods: names in `skipinit_jax.methods.NAMES`.
    dataset: digits, fashion_mnist, cifar10, cifar100, or noise: Gaussian 8x8 images.
    data_dir: where tensorflow-datasets keeps its files; None: its own default.
    batch_size: training images of the batch.
    num_seeds: initializations of each network.
    seed: seed of the initializations and of the noise.
    theory: whether to draw lines of theory. They take long on large images.
  """

  model: str = "residual_mlp"
  depth: int = 50
  width: int = 128
  version: int = 2
  layers_per_block: int = 1
  methods: tuple[str, ...] = (
    "batch_norm",
    "skipinit_inverse_sqrt_depth",
    "divide_by_sqrt2",
    "unnormalized",
  )
  dataset: str = "digits"
  data_dir: str | None = None
  batch_size: int = 64
  num_seeds: int = 4
  seed: int = 0
  theory: bool = True

  def validate(self) -> None:
    """Raises a UsageError for names and sizes that nothing else would check."""
    for name, known in {
      "model": (*MODELS, LINEAR),
      "dataset": (*data.known_names(), NOISE),
    }.items():
      if getattr(self, name) not in known:
        raise unknown_name(name, getattr(self, name), known)
    if not self.methods:
      raise UsageError("methods is empty: name at least one method.")
    if len(set(self.methods)) < len(self.methods):
      raise UsageError(f"methods names one twice: {', '.join(self.methods)}.")
    if self.batch_size < 2:
      raise UsageError(
        f"batch_size is {self.batch_size}: a variance over the batch and the "
        "similarity of two inputs need at least 2."
      )
    if not 0 <= self.seed < 2**32:
      raise UsageError(f"seed is {self.seed}: it must be in [0, 2^32).")


def demo() -> SignalConfig:
  """Four methods in a fully connected network, in less than a minute on a CPU."""
  return SignalConfig()


def linear() -> SignalConfig:
  """The paper's linear fully connected networks, normalized and not, on noise."""
  return SignalConfig(
    model=LINEAR,
    depth=100,
    width=256,
    methods=("unnormalized", "batch_norm"),
    dataset=NOISE,
    batch_size=128,
    num_seeds=4,
  )


def batch_norm() -> SignalConfig:
  """The paper's batch-normalized convolutional network, beside the unnormalized."""
  return SignalConfig(
    model="wide_resnet",
    depth=40,
    width=1,
    methods=("batch_norm", "unnormalized"),
    batch_size=32,
  )


def skipinit() -> SignalConfig:
  """Convolutional networks with SkipInit's scalar at several initial values."""
  return SignalConfig(
    model="wide_resnet",
    depth=40,
    width=1,
    methods=("skipinit", "skipinit_inverse_sqrt_depth", "skipinit_one"),
    batch_size=32,
  )


CONFIGS: dict[str, Callable[[], SignalConfig]] = {
  "demo": demo,
  "linear": linear,
  "batch_norm": batch_norm,
  "skipinit": skipinit,
}
