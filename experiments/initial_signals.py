"""Networks at initialization, how their signals are measured, and what theory expects.

`experiments.signal_propagation` reports on them, and `experiments.concepts` draws them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from skipinit_jax import data, methods, models
from skipinit_jax.analysis import figures, measure, theory
from skipinit_jax.analysis.signal import Signal
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.fields import check_types, unusual
from skipinit_jax.methods import Method
from skipinit_jax.models import ResidualBlock, ResidualMLP, ResNet, VisionTransformer
from skipinit_jax.studies.checks import check_lists
from skipinit_jax.training import TrainConfig
from skipinit_jax.training.size import check_network

_NETWORK = ("model", "depth", "width", "version", "layers_per_block", "data_dir")
LINEAR = "linear_mlp"
NOISE = "noise"

# The signal ends at the last block: the classifier behind it changes nothing.
_NUM_CLASSES = 10


@dataclasses.dataclass
class SignalConfig:
  """Networks of one kind and depth, and the batch that passes through them.

  Attributes:
    model: wide_resnet, resnet, residual_mlp, or linear_mlp: fully connected without
      activation.
    depth: layers; blocks of a fully connected network.
    width: factor on the features of a wide_resnet, features of a fully connected
      network.
    version: 1 (post-activation) or 2 (pre-activation), of a resnet; None: the method's
      own, or else 2.
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
  version: int | None = None
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
    """Raises a UsageError for a value that is not allowed, or without effect."""
    check_types(self)
    check_lists(self)
    for name, known in {
      "model": (*models.known_names(), LINEAR),
      "dataset": (*data.known_names(), NOISE),
    }.items():
      if getattr(self, name) not in known:
        raise unknown_name(name, getattr(self, name), known)
    if self.batch_size < 2:
      raise UsageError(
        f"batch_size is {self.batch_size}: a variance over the batch and the "
        "similarity of two inputs need at least 2."
      )
    if not 0 <= self.seed < 2**32:
      raise UsageError(f"seed is {self.seed}: it must be in [0, 2^32).")
    unused = make_train_config(self).unused()
    for name, _ in unusual(self):
      if name in unused:
        raise UsageError(
          f"{name} is {getattr(self, name)}: it is {unused[name]}, so it must be left "
          "out."
        )


def measure_networks(config: SignalConfig) -> dict[str, figures.Curve]:
  """Measures the network of each method, and predicts its signal.

  Returns:
    Signals by the names of the methods.

  Raises:
    UsageError: a field's value is not allowed.
  """
  config.validate()
  # All models first: one that does not exist is found before any work.
  networks = {name: make_model(config, methods.get(name)) for name in config.methods}
  images = make_images(config)
  for model in networks.values():
    check_network(model, images.shape[1:], images.dtype.itemsize)
  curves = {}
  for name, model in networks.items():
    predicted = predict(model, images) if config.theory else None
    measured = measure.over_seeds(
      model,
      images,
      num_seeds=config.num_seeds,
      key=jax.random.key(config.seed),
      train=True,
    )
    curves[name] = figures.Curve(methods.get(name).title, measured, predicted)
  return curves


def make_model(config: SignalConfig, method: Method) -> Any:
  """Returns the network of a method."""
  if config.model == LINEAR:
    return ResidualMLP(
      config.depth,
      config.width,
      _NUM_CLASSES,
      methods.linear(method),
      layers_per_block=config.layers_per_block,
    )
  train = make_train_config(config)
  return dataclasses.replace(train, method=method.name).make_model(_NUM_CLASSES)


def make_train_config(config: SignalConfig) -> TrainConfig:
  """Returns how one would train its networks, linear ones as others."""
  fields = {name: getattr(config, name) for name in _NETWORK}
  if config.model == LINEAR:
    fields["model"] = "residual_mlp"
  if config.dataset != NOISE:
    fields["dataset"] = config.dataset
  return TrainConfig(**fields)


def make_images(config: SignalConfig) -> jax.Array:
  """Returns the batch that passes through the networks, [N, H, W, C]."""
  if config.dataset == NOISE:
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    return jax.random.normal(key, (config.batch_size, 8, 8, 3))
  dataset = data.load(config.dataset, data_dir=config.data_dir)
  if config.batch_size > dataset.train.num_examples:
    raise UsageError(
      f"batch_size is {config.batch_size}, but {config.dataset} has only "
      f"{dataset.train.num_examples} training images."
    )
  images = jnp.asarray(dataset.train.images[: config.batch_size])
  return data.augmentation.normalize(images, dataset.mean, dataset.std)


def predict(model: Any, images: jax.Array) -> Signal | None:
  """Returns the signal by theory, None for networks that it does not cover."""
  if isinstance(model, VisionTransformer):
    return None
  if not isinstance(model, ResNet):
    return theory.predict_model(model, images)
  if model.version == 1:
    return None
  network = theory.describe(model, images.shape)
  kernel = theory.Kernel.of(_first_features(model, images))
  return theory.predict(network, kernel, len(images))


def _first_features(model: Any, images: jax.Array) -> jax.Array:
  """Returns what one initialization's first block takes, behind a max pool."""
  features: list[jax.Array] = []

  def record(run: Any, args: tuple[Any, ...], kwargs: Any, context: Any) -> Any:
    if isinstance(context.module, ResidualBlock):
      features.append(args[0])
    return run(*args, **kwargs)

  def run(images: jax.Array) -> jax.Array:
    with nn.intercept_methods(record):
      model.init(jax.random.key(0), images, train=True)
    return features[0]

  return jax.jit(run)(images)
