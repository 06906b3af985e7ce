"""The typed configuration of a training run."""

import dataclasses
import inspect
import json
import numbers
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from skipinit_jax import data, methods, models
from skipinit_jax.data import augmentation, streaming
from skipinit_jax.errors import UsageError, unknown_name
from skipinit_jax.fields import call, check_types, taken, unusual, usual
from skipinit_jax.files import local_workdir, to_json
from skipinit_jax.models import registry
from skipinit_jax.training.schedules import SCHEDULES
from skipinit_jax.training.transformations import OPTIMIZERS, ROLES

_CHANGEABLE = (
  "data_dir",
  "data_workers",
  "shard_params",
  "checkpoint_every_seconds",
  "signal_every_steps",
  "profile_steps",
)
_DTYPES = ("float32", "bfloat16")
_COUNTS = (
  "batch_size",
  "accumulation_steps",
  "epochs",
  "eval_every_epochs",
  "ghost_batch_size",
  "image_size",
)
_BELOW_ONE = ("momentum", "dropout_rate", "drop_path", "label_smoothing", "ema_decay")
_LARGEST = float(jnp.finfo(jnp.float32).max)
_POSITIVE = ("clip_norm", "adaptive_clip", "halve_every_epochs", "growth_per_epoch")


@dataclasses.dataclass
class TrainConfig:
  """A training run: what decides its result, and how it is run.

  Attributes:
    dataset: digits, fashion_mnist, cifar10, cifar100, one of `data.register`; or
      imagenet2012, sample_photos or image_folder, which are streamed from their files
      and always cropped and flipped at random, as `data.streaming` says.
    data_dir: where tensorflow-datasets keeps its files; None: its own default; for
      image_folder the folder with train/CLASS/*.jpg and val/CLASS/*.jpg.
    data_workers: processes that decode a streamed set, on each host; None: one for
      every two cores; 0: none but the program's own.
    image_size: height and width of the images of a streamed set; None: 224.
    crop_padding: pixels of padding on each side before a random crop; 0: no crop.
    flip: whether to flip training images at random.
    model: wide_resnet, resnet, residual_mlp, vision_transformer or one of
      `models.register`.
    depth: layers; in a residual_mlp blocks, in a vision_transformer encoder layers.
    width: factor on the features of a wide_resnet; features of a residual_mlp and of
      the tokens of a vision_transformer.
    version: 1 (post-activation) or 2 (pre-activation), of a resnet; None: the method's
      own, which is 1 for Fixup, or else 2.
    symmetric_padding: whether a resnet or wide_resnet pads both sides alike, as PyTorch
      does: for weights from there (`skipinit_jax.convert`).
    symmetric_stem: whether the convolution of a resnet's stem does, whatever the rest
      does: alone, for weights of Flax's ImageNet example.
    average_projection: whether a resnet's projections with strides take means of
      pixels, as timm's nf_resnet50 does.
    layers_per_block: layers of one branch of a residual_mlp.
    patch_size: height and width in pixels of the patches of a vision_transformer.
    num_heads: attention heads of a vision_transformer.
    method: a name in `skipinit_jax.methods.NAMES`.
    dropout_rate: dropout before the classifier; None: the method's own rate.
    drop_path: the rate at which the last block's branch is left out, for each example
      by itself; before it the rate grows linearly with depth (stochastic depth, Huang
      et al., ECCV 2016); None: the method's own rate.
    use_bias: whether convolutions and dense layers have biases; None: as the method.
    alpha: initial value of the scalar at the end of each branch; None: the method's
      own, if it has one.
    learnable_alpha: whether alpha is a parameter or a constant; None: as the method.
    ghost_batch_size: examples of a ghost batch; None: normalize the global batch.
    init_from: where the first weights are from: a run's workdir, an export or its
      safetensors file, or a PyTorch file by names of torchvision or timm. All must fit
      but a classifier of other classes, which is new; None: all are drawn at random.
    freeze: parameters that stay as they are: roles (kernel, scale or bias) or regular
      expressions to be found in names such as stage1_first/conv1/kernel, by commas.
      Normalizers' statistics are no parameters and follow the batches.
    scan: whether to scan over equal blocks, or to write them out.
    remat: whether to recompute blocks in the backward pass to save memory.
    dtype: dtype of the computation, float32 or bfloat16.
    param_dtype: dtype of the parameters, float32 or bfloat16.
    shard_params: whether parameters, their gradients and the optimizer's state are cut
      among the devices (fully sharded data parallelism), which takes less memory, or
      whole on each of them. The result is the same but for rounding.
    batch_size: examples of one optimizer step, over all devices.
    accumulation_steps: parts of a batch whose gradients are added up one after the
      other; normalization sees one part at a time.
    epochs: passes over the training set.
    learning_rate: the schedule's highest rate.
    kernel_rate_factor: factor on the learning rate of kernels; None: the method's own.
    scale_rate_factor: likewise of scales: normalizers', alpha, standardized weights'.
      Fixup's own is 0.1.
    bias_rate_factor: likewise of every kind of bias. Fixup's own is 0.1.
    optimizer: sgd; adamw (Loshchilov & Hutter, ICLR 2019) or lamb (You et al., ICLR
      2020), with optax's constants, and for lamb each block of a stack by itself.
    momentum: heavy-ball momentum of sgd.
    nesterov: whether momentum is Nesterov's.
    l2: coefficient of the L2 penalty `l2/2 |w|^2`, whose gradient sgd adds. It reaches
      every parameter, scales, scalars and biases too, but for `l2_exempt`.
    weight_decay: of adamw and lamb, decoupled: the rate times so much of each parameter
      is taken from it, but for `l2_exempt`.
    l2_exempt: roles of parameters without L2 or weight decay: kernel, scale or bias.
      ('scale', 'bias') leaves it to kernels, as the later code of SkipInit's authors
      does.
    clip_norm: largest global norm of the gradient; None: no clipping.
    adaptive_clip: largest ratio of gradient norm to parameter norm, unit by unit but
      for the classifier, scalars and what starts at zero (Brock et al., ICML 2021,
      which uses 0.01 for batches of 4096 and more for smaller ones); None: no clipping.
    label_smoothing: share of each training label that all classes get alike.
    mixup: concentration of the Beta distribution by which each batch's images and
      labels are mixed (Zhang et al., ICLR 2018); 0: none are.
    ema_decay: decay, at each step, of a moving average of the parameters, which is
      evaluated beside them; None: no average.
    schedule: halving, cosine, constant or exponential.
    constant_epochs: epochs before the first halving.
    halve_every_epochs: epochs between halvings.
    warmup_epochs: epochs in which the rate also grows linearly from zero.
    growth_per_epoch: factor on the rate per epoch, of exponential.
    seed: seed of initialization, shuffling, augmentation and dropout.
    eval_every_epochs: epochs between evaluations on the test set.
    checkpoint_every_seconds: least time between checkpoints, after the first epoch's;
      0: one an epoch.
    signal_every_steps: steps between measurements of the signal in each block, from
      step 0 on, and at the last step (`training.signal_log`); 0: none. A measurement
      takes up to the time of a step.
    profile_steps: steps to record by JAX's profiler, from the second dispatch of steps
      on, in the workdir's folder `profile`; 0: none.
  """

  # Data
  dataset: str = "digits"
  data_dir: str | None = None
  data_workers: int | None = None
  image_size: int | None = None
  crop_padding: int = 0
  flip: bool = False
  # Network
  model: str = "wide_resnet"
  depth: int = 16
  width: int = 1
  version: int | None = None
  symmetric_padding: bool = False
  symmetric_stem: bool = False
  average_projection: bool = False
  layers_per_block: int = 1
  patch_size: int = 2
  num_heads: int = 4
  method: str = "skipinit"
  dropout_rate: float | None = None
  drop_path: float | None = None
  use_bias: bool | None = None
  alpha: float | None = None
  learnable_alpha: bool | None = None
  ghost_batch_size: int | None = None
  init_from: str | None = None
  freeze: tuple[str, ...] = ()
  scan: bool = True
  remat: bool = False
  dtype: str = "float32"
  param_dtype: str = "float32"
  shard_params: bool = False
  # Optimization
  batch_size: int = 64
  accumulation_steps: int = 1
  epochs: int = 10
  learning_rate: float = 2**-5
  kernel_rate_factor: float | None = None
  scale_rate_factor: float | None = None
  bias_rate_factor: float | None = None
  optimizer: str = "sgd"
  momentum: float = 0.9
  nesterov: bool = False
  l2: float = 5e-4
  weight_decay: float = 1e-4
  l2_exempt: tuple[str, ...] = ()
  clip_norm: float | None = None
  adaptive_clip: float | None = None
  label_smoothing: float = 0.0
  mixup: float = 0.0
  ema_decay: float | None = None
  schedule: str = "halving"
  constant_epochs: float = 5.0
  halve_every_epochs: float = 1.0
  warmup_epochs: float = 0.0
  growth_per_epoch: float = 1.0
  # The run
  seed: int = 0
  eval_every_epochs: int = 1
  checkpoint_every_seconds: float = 60.0
  signal_every_steps: int = 0
  profile_steps: int = 0

  @property
  def model_title(self) -> str:
    """The name of the kind of network for people."""
    return registry.get(self.model).title

  @property
  def network_title(self) -> str:
    """The name of the network for people, such as "Wide-ResNet 16-1"."""
    fields = taken(registry.get(self.model).factory)
    depth = f" {self.depth}" if "depth" in fields else ""
    width = f"-{self.width}" if "width" in fields else ""
    version = f" v{self._version}" if "version" in fields else ""
    return f"{self.model_title}{depth}{width}{version}"

  @property
  def _version(self) -> int:
    return self.version or methods.get(self.method).resnet_version or 2

  def identity(self) -> dict[str, Any]:
    """Returns the fields that a resumed run must agree with: those of its result.

    Where the data and the parameters lie, how often checkpoints are written and signals
    are measured, and what is profiled may change.
    """
    fields = {**dataclasses.asdict(self), "init_from": _place(self.init_from)}
    if self.model == "resnet":
      fields["version"] = self._version
    return {name: fields[name] for name in fields if name not in _CHANGEABLE}

  @classmethod
  def stored(cls, fields: Mapping[str, Any], has_record: bool) -> dict[str, Any]:
    """Returns what the fields in a workdir mean to this version.

    Args:
      fields: those that the version had which wrote them.
      has_record: whether that version also wrote `files.RECORD`.

    Raises:
      UsageError: this version would not go on as the run began.
    """
    meant = {**cls().identity(), **fields}
    meant["init_from"] = _place(meant["init_from"])
    # Before `symmetric_stem`, all networks had a version, and all of Fixup's parameters
    # one rate.
    if "symmetric_stem" not in fields:
      if meant["model"] != "resnet":
        meant["version"] = None
      if meant["method"] == "nf_resnet":
        raise UsageError(
          "The run was begun by a version whose nf_resnet was another network, and "
          "cannot be resumed by this one: use another --workdir."
        )
      if meant["method"].startswith("fixup"):
        for name in ("scale_rate_factor", "bias_rate_factor"):
          if meant.get(name) is None:
            meant[name] = 1.0
    if has_record:
      return meant
    # Before there were records, only one schedule had a warm-up.
    if meant["schedule"] != "cosine":
      meant["warmup_epochs"] = 0.0
    if meant["adaptive_clip"] is not None:
      raise UsageError(
        "The run was begun by a version whose adaptive_clip also clipped what starts "
        "at zero, and cannot be resumed by this one: use another --workdir."
      )
    return meant

  def _takers(self) -> dict[str, tuple[str, dict[str, tuple[Any, ...]]]]:
    """Returns what takes fields, where another field chooses who does.

    A field that none of them takes has an effect in any case.

    Returns:
      By the name of the field that chooses: what is chosen, and by each choice what
      then takes fields: functions and classes, by their parameters.
    """
    takers: dict[str, tuple[str, dict[str, tuple[Any, ...]]]] = {
      "dataset": (
        self.dataset,
        {name: _data_takers(name) for name in data.known_names()},
      ),
      "model": (
        self.model,
        {name: (registry.get(name).factory,) for name in models.known_names()},
      ),
      "schedule": (self.schedule, {name: (SCHEDULES[name],) for name in SCHEDULES}),
      "optimizer": (self.optimizer, {**OPTIMIZERS}),
    }
    # Some fields decide whether what takes them has an effect at all.
    for part in takers["optimizer"][1].get(self.optimizer, ()):
      name = _deciding(part)
      takers[name] = ("above 0" if getattr(self, name) else "0", {"above 0": (part,)})
    takers["optimizer"][1][self.optimizer] = ()
    if self.schedule == "halving":
      # Behind the first halving comes the next one within the run, or none does.
      period = min(self.halve_every_epochs, usual(self).halve_every_epochs)
      below = f"below {self.epochs - period:g}"
      chosen = below if self.constant_epochs + period < self.epochs else "not below"
      takers["constant_epochs"] = (chosen, {below: (SCHEDULES["halving"],)})
      takers["schedule"][1]["halving"] = ()
    return takers

  def unused(self) -> dict[str, str]:
    """Returns the fields without effect here, with what they are for, in words."""
    takers = self._takers()
    used: set[str] = {*takers}
    users: dict[str, dict[str, list[str]]] = {}
    for field, (chosen, choices) in takers.items():
      for choice, parts in choices.items():
        for name in frozenset().union(*map(taken, parts)):
          users.setdefault(name, {}).setdefault(field, []).append(choice)
          if choice == chosen:
            used.add(name)

    def clauses(users: Mapping[str, list[str]]) -> list[str]:
      # Where a field within the choice decides, the choice itself is no reason.
      decided = [each for each in users if takers[each][1].get(takers[each][0]) == ()]
      return [
        f"for {each} {' or '.join(choices)}, not for {getattr(self, each)!r}"
        for each, choices in users.items()
        if each not in decided or len(decided) == len(users)
      ]

    return {
      field.name: " and ".join(clauses(users[field.name]))
      for field in dataclasses.fields(self)
      if field.name in users and field.name not in used
    }

  def used(self) -> dict[str, Any]:
    """Returns the fields that have an effect, by name."""
    unused = self.unused()
    fields = dataclasses.asdict(self)
    return {name: fields[name] for name in fields if name not in unused}

  def validate(self, num_devices: int = 1) -> None:
    """Checks the fields and that the batch divides.

    A field without effect must have its usual value: see `fields.take_as_usual`.

    Args:
      num_devices: devices that share a batch.

    Raises:
      UsageError: a field's value is not allowed.
    """
    check_types(self)
    for name, known in {
      "dataset": data.known_names(),
      "model": models.known_names(),
      "optimizer": OPTIMIZERS,
      "method": methods.NAMES,
      "schedule": SCHEDULES,
      "dtype": _DTYPES,
      "param_dtype": _DTYPES,
    }.items():
      if getattr(self, name) not in known:
        raise unknown_name(name, getattr(self, name), known)
    for role in self.l2_exempt:
      if role not in ROLES:
        raise unknown_name("role in l2_exempt", role, ROLES)
    for part in OPTIMIZERS[self.optimizer]:
      decay = _deciding(part)
      if (
        "l2_exempt" in taken(part)
        and getattr(self, decay)
        and {*self.l2_exempt} == {*ROLES}
      ):
        raise UsageError(
          f"l2_exempt is {self.l2_exempt}, which is everything: set {decay} to 0 "
          "instead."
        )
    for name in (field.name for field in dataclasses.fields(self)):
      value = getattr(self, name)
      bits = 32 if name == "seed" else 31
      if isinstance(value, int) and value >= 2**bits:
        raise UsageError(f"{name} is {value}: it must be below 2^{bits}.")
      if name in _COUNTS and value is not None and value < 1:
        raise UsageError(f"{name} is {value}: it must be at least 1.")
      if isinstance(value, numbers.Real) and not 0 <= float(value) <= _LARGEST:
        raise UsageError(
          f"{name} is {value}: it must be finite in float32 and not negative."
        )
      if name in _POSITIVE and value == 0:
        raise UsageError(f"{name} is 0: it must be above 0.")
      if name in _BELOW_ONE and value is not None and value >= 1:
        raise UsageError(f"{name} is {value}: it must be below 1.")
    if self.warmup_epochs >= self.epochs:
      raise UsageError(
        f"warmup_epochs is {self.warmup_epochs}: it must be below epochs, which is "
        f"{self.epochs}."
      )
    unused = self.unused()
    for name, _ in unusual(self):
      if name in unused:
        raise UsageError(
          f"{name} is {getattr(self, name)}: it is {unused[name]}, so it must be left "
          "out."
        )
    self.make_method()
    self._validate_batch(num_devices)

  def load_dataset(self) -> data.Dataset | data.StreamedDataset:
    """Returns the data set, from local files.

    Raises:
      UsageError: it is not there, or damaged.
    """
    dataset: data.Dataset | data.StreamedDataset = call(
      _data_takers(self.dataset)[0], self, self.dataset
    )
    return dataset

  def _validate_batch(self, num_devices: int) -> None:
    part, rest = divmod(self.batch_size, self.accumulation_steps)
    if rest:
      raise UsageError(
        f"batch_size {self.batch_size} is not a multiple of accumulation_steps "
        f"{self.accumulation_steps}."
      )
    of_part = " / accumulation_steps" if self.accumulation_steps > 1 else ""
    if self.mixup and self.batch_size < 2:
      raise UsageError(f"mixup is {self.mixup}, but a batch of 1 has no other image.")
    if self.signal_every_steps and part < 2:
      raise UsageError(
        f"batch_size{of_part} is {part}: signal_every_steps measures variances over "
        "it and needs at least 2 examples."
      )
    local, rest = divmod(part, num_devices)
    if rest:
      raise UsageError(
        f"batch_size{of_part} is {part}: it is not a multiple of the {num_devices} "
        "devices."
      )
    ghost = self.ghost_batch_size
    if ghost is None:
      return
    if part % ghost:
      raise UsageError(
        f"batch_size{of_part} is {part}: it is not a multiple of ghost_batch_size "
        f"{ghost}."
      )
    if local % ghost and ghost % local:
      raise UsageError(
        f"ghost_batch_size {ghost} would cross devices: it neither divides the "
        f"{local} examples of a device nor is a multiple of them."
      )

  def make_method(self) -> methods.Method:
    """Returns the method, as this configuration changes it.

    Raises:
      UsageError: a change does not apply to the method.
    """
    method = methods.get(self.method)
    if self.alpha is not None:
      method = dataclasses.replace(method, alpha=self.alpha)
    if self.learnable_alpha is not None:
      if method.alpha is None:
        raise UsageError(
          f"learnable_alpha is {self.learnable_alpha}, but method {self.method!r} has "
          "no alpha: set it."
        )
      method = dataclasses.replace(method, learnable_alpha=self.learnable_alpha)
    for name in (
      "use_bias",
      "dropout_rate",
      "drop_path",
      *(f"{role}_rate_factor" for role in ROLES),
    ):
      if getattr(self, name) is not None:
        method = dataclasses.replace(method, **{name: getattr(self, name)})
    if self.ghost_batch_size is not None:
      method = methods.with_ghost_batches(method, self.ghost_batch_size)
    return method

  def make_model(self, num_classes: int) -> nn.Module:
    """Returns the network, with a logit for each class.

    Raises:
      UsageError: the network has no such depth, width or version.
    """
    factory = registry.get(self.model).factory
    given = {
      "num_classes": num_classes,
      "method": self.make_method(),
      "dtype": jnp.dtype(self.dtype),
      "param_dtype": jnp.dtype(self.param_dtype),
    }
    given = {name: given[name] for name in given.keys() & taken(factory)}
    made: nn.Module = call(factory, self, **given)
    if not isinstance(made, nn.Module):
      raise UsageError(
        f"model {self.model!r} is a {type(made).__name__}: its factory must return a "
        "module of Flax Linen."
      )
    return made


def _deciding(part: Any) -> str:
  """Returns the field of an optimizer's part whose zero leaves the others no effect."""
  return next(iter(inspect.signature(part).parameters))


def _place(init_from: Any) -> Any:
  """Returns the full path where weights are, whatever the directory and the home."""
  if not isinstance(init_from, str) or "://" in init_from:
    return init_from
  return str(local_workdir(init_from, "init_from"))


def _load_streamed(
  name: str, data_dir: str | None, image_size: int | None
) -> data.StreamedDataset:
  size = {} if image_size is None else {"image_size": image_size}
  return streaming.load(name, data_dir=data_dir, **size)


def _load_folder(name: str, image_size: int | None) -> data.StreamedDataset:
  return _load_streamed(name, None, image_size)


def _load_unprepared(name: str) -> data.Dataset:
  return data.load(name)


def _data_takers(name: str) -> tuple[Any, ...]:
  """Returns the loader of a data set, and what else takes fields for it."""
  if data.is_streamed(name):
    load = _load_folder if name not in data.NAMES else _load_streamed
    return load, streaming.num_workers
  prepared = name in data.PREPARED_NAMES
  return data.load if prepared else _load_unprepared, augmentation.augment


def differences(
  there: Mapping[str, Any], here: Mapping[str, Any], *, known_only: bool = False
) -> list[str]:
  """Returns a clause for each value that differs.

  Args:
    there: nested dicts of what `to_json` takes.
    here: likewise.
    known_only: whether what has no value there is no difference: an older version did
      not record it.

  Returns:
    Such as "model.depth is 16 there and absent here", by the values' dotted names.
  """
  # An empty dict inside is a value.
  flat_there, flat_here = (
    traverse_util.flatten_dict(
      to_json(each), sep=".", is_leaf=lambda path, value: path and not value
    )
    for each in (there, here)
  )

  def show(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name]) if name in flat else "absent"

  return [
    f"{name} is {show(flat_there, name)} there and {show(flat_here, name)} here"
    for name in (flat_there if known_only else flat_there | flat_here)
    if name not in flat_there
    or name not in flat_here
    or flat_there[name] != flat_here[name]
  ]
