r"""Measures how signal and gradient pass through networks, on the lines of theory.

Example:
  python -m experiments.signal_propagation --workdir=/tmp/signal --diagnose

Any model, methods and depth:
  python -m experiments.signal_propagation --workdir=/tmp/signal \
    --config.model=wide_resnet --config.depth=100 --config.width=2 \
    --config.methods="('batch_norm', 'skipinit')"
"""

import dataclasses
import importlib.metadata
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn

from experiments import program
from skipinit_jax import analysis, data, document, methods
from skipinit_jax.analysis import measure, theory
from skipinit_jax.analysis.signal import Signal
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.files import write_json
from skipinit_jax.methods import Method
from skipinit_jax.models import (
  ResidualBlock,
  ResidualMLP,
  ResNet,
  VisionTransformer,
)
from skipinit_jax.training import TrainConfig
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


CONFIGS = {
  "demo": demo,
  "linear": linear,
  "batch_norm": batch_norm,
  "skipinit": skipinit,
}

_WORKDIR = program.define_workdir("signal.json, the figures, tables and report")
_CONFIG = program.define_config(CONFIGS, default="demo")
_DIAGNOSE = flags.DEFINE_boolean(
  "diagnose", False, "Whether to say of each network if its depth lets it train."
)
# The signal ends at the last block: the classifier behind it changes nothing.
_NUM_CLASSES = 10
# Rows of a network in the table of blocks.
_MOST_ROWS = 12


@dataclasses.dataclass(frozen=True)
class Result:
  """What is known of one network.

  Attributes:
    method: its method.
    curve: its signal, measured and predicted.
    diagnosis: its verdict.
  """

  method: Method
  curve: analysis.figures.Curve
  diagnosis: analysis.Diagnosis


def main() -> None:
  """Runs the program."""
  config, workdir = _CONFIG.value, _WORKDIR.value
  results = measure_networks(config)
  page, *_ = document.write(_report(config, results), workdir)
  write_json(
    pathlib.Path(workdir, "signal.json"),
    {
      "config": dataclasses.asdict(config),
      "networks": {each.method.name: _numbers(each) for each in results},
    },
  )
  document.print_table(_summary_table(results))
  if _DIAGNOSE.value:
    for result in results:
      print(f"{result.method.title}: {result.diagnosis}\n")
  program.print_report(page)


def measure_networks(config: SignalConfig) -> list[Result]:
  """Measures, predicts and diagnoses the network of each method.

  Args:
    config: the networks and the batch.

  Returns:
    A result for each method, in their order.

  Raises:
    UsageError: a field's value is not allowed.
  """
  config.validate()
  # All models first: one that does not exist is found before any work.
  named = [methods.get(name) for name in config.methods]
  models = [_make_model(config, method) for method in named]
  images = _images(config)
  return [
    _result(config, method, model, images)
    for method, model in zip(named, models, strict=True)
  ]


def _make_model(config: SignalConfig, method: Method) -> Any:
  if config.model == LINEAR:
    return ResidualMLP(
      config.depth,
      config.width,
      _NUM_CLASSES,
      methods.linear(method),
      layers_per_block=config.layers_per_block,
    )
  return TrainConfig(
    model=config.model,
    depth=config.depth,
    width=config.width,
    version=config.version,
    layers_per_block=config.layers_per_block,
    method=method.name,
  ).make_model(_NUM_CLASSES)


def _images(config: SignalConfig) -> jax.Array:
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


def _result(
  config: SignalConfig, method: Method, model: Any, images: jax.Array
) -> Result:
  predicted = _predict(model, images) if config.theory else None
  measured = measure.over_seeds(
    model,
    images,
    num_seeds=config.num_seeds,
    key=jax.random.key(config.seed),
    train=True,
  )
  return Result(
    method=method,
    curve=analysis.figures.Curve(method.title, measured, predicted),
    diagnosis=analysis.diagnose_signal(measured.mean),
  )


def _predict(model: Any, images: jax.Array) -> Signal | None:
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

  def run(images: jax.Array) -> jax.Array:
    features: list[jax.Array] = []

    def record(
      run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
      called = context.method_name == "__call__"
      if called and isinstance(context.module, ResidualBlock) and not features:
        features.append(args[0])
      return run(*args, **kwargs)

    with nn.intercept_methods(record):
      model.init(jax.random.key(0), images, train=True)
    return features[0]

  return jax.jit(run)(images)


def _numbers(result: Result) -> dict[str, Any]:
  """Returns all numbers of a network, for `signal.json`."""

  def plain(signal: Signal) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(Signal)]
    names = [name for name in fields if name not in ("names", "alpha")]
    with np.errstate(all="ignore"):
      derived = ("branch_to_skip", "relative_gradient")
      return {name: np.asarray(getattr(signal, name)).tolist() for name in names} | {
        name: np.asarray(getattr(signal, name)).tolist() for name in derived
      }

  curve = result.curve
  weights = analysis.figures.measured_path_weights(curve.measured)
  numbers: dict[str, Any] = {
    "blocks": list(curve.measured.signals.names),
    "mean": plain(curve.measured.mean),
    "standard_error": plain(curve.measured.standard_error),
    "theory": None if curve.theory is None else plain(curve.theory),
    "path_weights": None
    if weights is None
    else {"mean": weights[0].tolist(), "standard_error": weights[1].tolist()},
    "path_weights_of_theory": None
    if curve.theory is None
    else theory.path_weights(curve.theory.branch_share).tolist(),
    "diagnosis": dataclasses.asdict(result.diagnosis)
    | {"text": result.diagnosis.text, "healthy": result.diagnosis.healthy},
  }
  # The error of a ratio is not the ratio of errors.
  for name in ("branch_to_skip", "relative_gradient"):
    with np.errstate(all="ignore"):
      values = getattr(curve.measured.signals, name)
      numbers["mean"][name] = values.mean(0).tolist()
      error = values.std(0, ddof=1) / len(values) ** 0.5
      numbers["standard_error"][name] = error.tolist()
  return numbers


def _pair(values: np.ndarray, expected: float | None) -> list[str]:
  """Returns entries of a measured mean with its standard error, and of theory."""
  with np.errstate(all="ignore"):
    mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5
  measured = f"{mean:.3g} ± {error:.1g}" if np.isfinite(error) else f"{mean:.3g}"
  return [measured, "" if expected is None else f"{expected:.3g}"]


def _summary_table(results: list[Result]) -> document.Table:
  rows = []
  for result in results:
    signal, expected = result.curve.measured.signals, result.curve.theory
    for quantity, name, index in (
      ("second moment of the last block's output", "second_moment", -1),
      ("branch-to-skip ratio of the last block", "branch_to_skip", -1),
      ("gradient before the first block", "relative_gradient", 0),
      ("cosine similarity behind the last block", "cosine", -1),
    ):
      with np.errstate(all="ignore"):
        value = None if expected is None else float(getattr(expected, name)[index])
        pair = _pair(getattr(signal, name)[:, index], value)
      rows.append([result.method.title, quantity, *pair])
    # The sum of the shares is the mean length of the paths.
    length = None if expected is None else float(expected.branch_share.sum())
    with np.errstate(all="ignore"):
      pair = _pair(signal.branch_share.sum(1), length)
    rows.append([result.method.title, "mean length of the paths", *pair])
  return document.Table(
    name="summary",
    title="From the first block to the last, measured and predicted",
    header=["method", "quantity", "measured", "theory"],
    rows=rows,
    note="Means ± standard errors over the seeds. The branch-to-skip ratio is of "
    "variances; the gradient's second moment is over that behind the last block; a "
    "path's length is the number of its branches.",
  )


def _blocks_table(results: list[Result]) -> document.Table:
  rows = []
  for result in results:
    signal, expected = result.curve.measured.signals, result.curve.theory
    num_blocks = len(signal.names)
    chosen = np.unique(np.linspace(0, num_blocks, _MOST_ROWS).round().astype(int))
    for block in chosen:
      row = [result.method.title, str(block)]
      for name in ("second_moment", "variance", "relative_gradient", "cosine"):
        with np.errstate(all="ignore"):
          value = None if expected is None else float(getattr(expected, name)[block])
          row += _pair(getattr(signal, name)[:, block], value)
      rows.append(row)
  header = ["method", "behind block"]
  for title in ("second moment", "variance", "gradient", "cosine"):
    header += [title, "theory"]
  return document.Table(
    name="blocks",
    title="The stream by block, measured and predicted",
    header=header,
    rows=rows,
    note="Block 0 is the first block's input. All blocks are in signal.json.",
  )


def _verdict_table(results: list[Result]) -> document.Table:
  return document.Table(
    name="verdict",
    title="Does the depth let the network train?",
    header=["method", "verdict", "in words"],
    rows=[
      [
        each.method.title,
        document.Entry("healthy", "good")
        if each.diagnosis.healthy
        else document.Entry("faulty", "bad"),
        each.diagnosis.text,
      ]
      for each in results
    ],
    note="The verdict is on the signal at initialization, averaged over the seeds; "
    "what stands behind the last block is not seen.",
  )


def _figures(results: list[Result]) -> list[document.Figure]:
  curves = [result.curve for result in results]
  note = "Points are means over the seeds, with standard errors"
  note += "; lines are theory." if any(curve.theory for curve in curves) else "."
  zero = " A branch of zeros is not on a logarithmic axis."
  make = analysis.figures
  return [
    document.Figure(
      name="stream",
      title="The stream from block to block",
      figure=make.stream_figure(curves),
      description="Two panels by block and method: second moment and variance of the "
      "stream.",
      note=f"{note} The variance is over examples and positions in each channel: it "
      "lacks the channels' squared means.",
    ),
    document.Figure(
      name="branch",
      title="What each block adds",
      figure=make.branch_figure(curves),
      description="Four panels by block and method: second moment and variance of skip "
      "path and branch.",
      note=note + zero,
    ),
    document.Figure(
      name="ratio",
      title="How much of a block is its branch",
      figure=make.ratio_figure(curves),
      description="Branch variance over skip variance by block and method.",
      note=note + zero,
    ),
    document.Figure(
      name="gradient",
      title="The gradient from the last block to the first",
      figure=make.gradient_figure(curves),
      description="Second moment of the gradient by block and method.",
      note=f"{note} It is divided by that behind the last block.",
    ),
    document.Figure(
      name="cosine",
      title="How alike two inputs become",
      figure=make.cosine_figure(curves),
      description="Cosine similarity of two inputs by block and method.",
      note=note,
    ),
    document.Figure(
      name="paths",
      title="The network as a sum of paths",
      figure=make.path_figure(curves),
      description="Weight of the paths of each length by method.",
      note=f"{note} A path takes the skip path or the branch at each block; its length "
      "counts the branches.",
    ),
  ]


def _report(config: SignalConfig, results: list[Result]) -> document.Document:
  images = (
    "noise" if config.dataset == NOISE else f"training images of {config.dataset}"
  )
  sections = [
    document.Section(
      "Summary", "", [_summary_table(results), _agreement_table(results)]
    ),
    document.Section("By block", "", _figures(results)),
    document.Section("Numbers", "", [_blocks_table(results)], collapsed=True),
  ]
  if _DIAGNOSE.value:
    sections.insert(1, document.Section("Verdict", "", [_verdict_table(results)]))
  num_blocks = len(results[0].curve.measured.signals.names)
  return document.Document(
    title="Signal propagation at initialization",
    lead=f"{config.model} of {num_blocks} residual blocks, {config.num_seeds} "
    f"initializations of each method, a batch of {config.batch_size} {images}.",
    findings=[],
    sections=sections,
    config=dataclasses.asdict(config),
    versions={
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "flax", "numpy")
    },
    device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    command=document.command_line(),
  )


def _agreement_table(results: list[Result]) -> document.Table:
  """Compares measurement and theory where neither overflows."""
  rows = []
  for result in results:
    measured, expected = result.curve.measured.signals, result.curve.theory
    row = [result.method.title]
    for name in ("second_moment", "relative_gradient"):
      factor = np.nan
      if expected is not None:
        with np.errstate(all="ignore"):
          # At a finite width it is the mean logarithm to which theory is close.
          logarithm = np.log(getattr(measured, name) / getattr(expected, name)).mean(0)
        known = np.abs(logarithm[np.isfinite(logarithm)])
        factor = np.exp(known.max()) if known.size else np.nan
      row.append("" if np.isnan(factor) else f"{factor:.2f}")
    rows.append(row)
  return document.Table(
    name="agreement",
    title="Largest factor between measurement and theory at any block",
    header=["method", "second moment", "gradient"],
    rows=rows,
    note="Geometric means over the seeds. Theory is of infinitely wide networks and of "
    "inputs that are all equally alike.",
  )


if __name__ == "__main__":
  program.run(main)
