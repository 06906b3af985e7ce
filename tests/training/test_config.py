"""Configurations: what is refused, in which sentence, and what a field decides."""

import dataclasses
import fractions
import math
import re
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax import data, methods, models
from skipinit_jax.errors import UsageError
from skipinit_jax.fields import take_as_usual
from skipinit_jax.models import ResidualMLP, ResNet, VisionTransformer, WideResNet
from skipinit_jax.training import config as config_lib
from skipinit_jax.training.config import TrainConfig


def message_of(num_devices=1, **fields):
  """Returns the error of a configuration, after checking that it is one sentence."""
  with pytest.raises(UsageError) as caught:
    TrainConfig(**fields).validate(num_devices)
  message = str(caught.value)
  # A period inside is one of a number.
  assert re.fullmatch(r"([^.\n]|\.(?=\d))+\.", message)
  return message


@pytest.mark.parametrize(
  ("field", "value", "known"),
  [
    ("dataset", "mnist", data.NAMES),
    ("model", "transformer", models.known_names()),
    ("method", "batchnorm", methods.NAMES),
    ("schedule", "linear", config_lib.SCHEDULES),
    ("optimizer", "adam", config_lib.OPTIMIZERS),
    ("dtype", "float16", ("float32", "bfloat16")),
    ("param_dtype", "int8", ("float32", "bfloat16")),
    ("l2_exempt", ("kernel", "biases"), config_lib.ROLES),
  ],
)
def test_unknown_name_lists_the_known(field, value, known):
  message = message_of(**{field: value})
  unknown = value[-1] if isinstance(value, tuple) else value
  assert message.startswith("Unknown ")
  assert field in message
  assert repr(unknown) in message
  listed = message.removesuffix(".").split("choose one of ")[1].split(", ")
  assert sorted(listed) == sorted(known)


NUMBERS = {
  field.name: field.type
  for field in dataclasses.fields(TrainConfig)
  if field.type in (int, float, int | None, float | None)
}
NOT_ZERO = [
  "accumulation_steps",
  "adaptive_clip",
  "batch_size",
  "clip_norm",
  "epochs",
  "eval_every_epochs",
  "ghost_batch_size",
  "growth_per_epoch",
  "halve_every_epochs",
  "image_size",
]


@pytest.mark.parametrize(
  ("name", "value"),
  [
    *((name, -1) for name in NUMBERS),
    *((name, 0) for name in NOT_ZERO),
    *(
      (name, value)
      for name in NUMBERS
      if NUMBERS[name] in (float, float | None)
      for value in (-0.5, math.nan, math.inf, 1e39)
    ),
  ],
)
def test_numbers_are_finite_and_not_negative(name, value):
  assert message_of(**{name: value}).startswith(f"{name} is {value}: it must be ")


@pytest.mark.parametrize(
  ("num_devices", "fields", "message"),
  [
    (1, {"momentum": 1.0}, "momentum is 1.0: it must be below 1."),
    (1, {"dropout_rate": 1.0}, "dropout_rate is 1.0: it must be below 1."),
    (1, {"drop_path": 1.0}, "drop_path is 1.0: it must be below 1."),
    (1, {"label_smoothing": 1.5}, "label_smoothing is 1.5: it must be below 1."),
    (1, {"ema_decay": 1.0}, "ema_decay is 1.0: it must be below 1."),
    (1, {"seed": 2**32}, "seed is 4294967296: it must be below 2^32."),
    (1, {"method": "batch_norm", "learnable_alpha": False}, "has no alpha: set it."),
    (
      1,
      {"epochs": 3, "warmup_epochs": 3.0},
      "warmup_epochs is 3.0: it must be below epochs, which is 3.",
    ),
    (1, {"batch_size": 64, "accumulation_steps": 3}, "multiple of accumulation_steps"),
    (8, {"batch_size": 36}, "batch_size is 36: it is not a multiple of the 8 devices."),
    # The batch divides, its parts do not.
    (8, {"batch_size": 48, "accumulation_steps": 4}, "is 12: it is not a multiple of "),
    (
      1,
      {"batch_size": 64, "accumulation_steps": 4, "ghost_batch_size": 32}
      | {"method": "batch_norm"},
      "is 16: it is not a multiple of ghost_batch_size 32.",
    ),
    # 24 = 2 devices x 12 = 3 ghost batches of 8: the second has 4 on each device.
    (
      2,
      {"batch_size": 24, "ghost_batch_size": 8, "method": "batch_norm"},
      "ghost_batch_size 8 would cross devices: it neither divides the 12 examples of ",
    ),
    (1, {"batch_size": 1, "mixup": 0.2}, "mixup is 0.2, but a batch of 1 has no other"),
    (1, {"ghost_batch_size": 8, "method": "skipinit"}, "has no batch normalization."),
    (
      1,
      {"batch_size": 4, "accumulation_steps": 4, "signal_every_steps": 1},
      "is 1: signal_every_steps measures variances",
    ),
    (1, {"l2_exempt": ["kernel", "scale", "bias"]}, "everything: set l2 to 0"),
    (
      1,
      {"l2_exempt": ["kernel", "scale", "bias"], "optimizer": "adamw"},
      "everything: set weight_decay to 0",
    ),
  ],
)
def test_fields_that_do_not_fit(num_devices, fields, message):
  assert message in message_of(num_devices, **fields)


@pytest.mark.parametrize(
  ("num_devices", "fields"),
  [
    # The bounds themselves.
    (1, {"learning_rate": 0.0, "momentum": 0.0, "l2": 0, "dropout_rate": 0.0}),
    (1, {"seed": 2**32 - 1, "checkpoint_every_seconds": 0}),
    (1, {"epochs": 3, "warmup_epochs": 2.9}),
    # A list is what JSON keeps of a tuple.
    (1, {"l2": 0.0, "l2_exempt": []}),
    (2, {"batch_size": 32, "ghost_batch_size": 8}),
    # Whole devices form a ghost batch where it does not fit on one.
    (8, {"batch_size": 64, "ghost_batch_size": 16}),
    (2, {"batch_size": 64, "accumulation_steps": 2, "ghost_batch_size": 16}),
    (8, {"batch_size": 64, "accumulation_steps": 8}),
  ],
)
def test_fields_that_fit(num_devices, fields):
  TrainConfig(method="output_batch_norm", **fields).validate(num_devices)


WITHOUT_EFFECT = {
  "width": [{"model": "resnet", "depth": 50}],
  "version": [{}, {"model": "residual_mlp"}, {"model": "vision_transformer"}],
  "symmetric_padding": [{"model": "vision_transformer"}, {"model": "residual_mlp"}],
  "symmetric_stem": [{}, {"model": "residual_mlp"}],
  "average_projection": [{}, {"model": "residual_mlp"}],
  "layers_per_block": [{}, {"model": "vision_transformer"}],
  "patch_size": [{}, {"model": "resnet", "depth": 50}],
  "num_heads": [{}, {"model": "residual_mlp"}],
  "constant_epochs": [{"schedule": name} for name in ("cosine", "constant")],
  "halve_every_epochs": [{"schedule": "exponential"}, {"epochs": 5}],
  "growth_per_epoch": [{}, {"schedule": "cosine"}, {"schedule": "constant"}],
  "l2": [{"optimizer": "adamw"}],
  "l2_exempt": [{"l2": 0.0}, {"optimizer": "adamw", "weight_decay": 0.0}],
  "momentum": [{"optimizer": "lamb"}],
  "nesterov": [{"momentum": 0.0}, {"optimizer": "adamw"}],
  "weight_decay": [{}],
  "crop_padding": [{"dataset": "imagenet2012"}],
  "flip": [{"dataset": "sample_photos"}],
  "image_size": [{}, {"dataset": "cifar10"}],
  "data_workers": [{}, {"dataset": "fashion_mnist"}],
  "data_dir": [{}],
}
ANOTHER = {bool: True, int: 3, float: 0.5, str: "x", tuple[str, ...]: ("bias",)}


def test_time_of_a_halving_that_is_behind_the_run():
  """The first is behind epoch 5, the next one behind epoch 6, if no earlier."""
  of_six = {"epochs": 6, "constant_epochs": 5.0}
  message = message_of(**of_six, halve_every_epochs=2.0)
  assert message.startswith(
    "halve_every_epochs is 2.0: it is for constant_epochs below 5, not for 5.0"
  )
  TrainConfig(**of_six, halve_every_epochs=0.5).validate()
  TrainConfig(epochs=7, constant_epochs=5.0, halve_every_epochs=2.0).validate()


@pytest.mark.parametrize(
  ("name", "choice"),
  [(name, choice) for name in WITHOUT_EFFECT for choice in WITHOUT_EFFECT[name]],
)
def test_field_without_effect(name, choice):
  TrainConfig(**choice).validate()
  kind = typing.get_type_hints(TrainConfig)[name]
  value = ANOTHER[
    typing.get_args(kind)[0] if name.startswith(("image", "data", "ver")) else kind
  ]
  message = message_of(**choice, **{name: value})
  assert message.startswith(f"{name} is {value}: it is for ")
  config = TrainConfig(**choice, **{name: value})
  assert name not in config.used()
  # What a named configuration sets is nobody's mistake.
  take_as_usual(config).validate()


def test_field_that_any_choice_uses_is_never_without_effect():
  conditional = {*WITHOUT_EFFECT}
  for model in models.known_names():
    for schedule in config_lib.SCHEDULES:
      assert {*TrainConfig(model=model, schedule=schedule).unused()} <= conditional


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("epochs", 2.5),
    ("epochs", True),
    ("seed", "1"),
    ("batch_size", None),
    ("learning_rate", "2^-4"),
    ("learning_rate", fractions.Fraction(1, 2)),
    ("learning_rate", False),
    ("clip_norm", "1"),
    ("flip", 1),
    ("use_bias", 0),
    ("dataset", None),
    ("data_dir", 3),
    ("l2_exempt", "bias"),
    ("l2_exempt", None),
  ],
)
def test_value_of_another_type(name, value):
  assert message_of(**{name: value}).startswith(f"{name} is {value!r}: it must be ")


def test_numbers_of_numpy():
  TrainConfig(epochs=np.int64(2), learning_rate=np.float32(0.5), l2=0).validate()


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("regularized_skipinit", {"dropout_rate": 0.6, "drop_path": 0.1}),
    # Zero is a value, not the absence of one.
    ("regularized_skipinit", {"dropout_rate": 0.0}),
    ("batch_norm", {"alpha": 0.0, "learnable_alpha": False}),
  ],
)
def test_fields_that_change_the_method(name, fields):
  expected = dataclasses.replace(methods.get(name), **fields)
  assert TrainConfig(method=name, **fields).make_method() == expected


FIXUP = methods.get("fixup")


@pytest.mark.parametrize(
  ("fields", "expected", "title"),
  [
    ({"depth": 10, "width": 2}, WideResNet(10, 2, 7, FIXUP), "Wide-ResNet 10-2"),
    (
      # Its paper's network; another version is said.
      {"model": "resnet", "depth": 50},
      ResNet(50, 7, FIXUP, version=1),
      "ResNet 50 v1",
    ),
    (
      {"model": "resnet", "depth": 18, "version": 2, "symmetric_stem": True},
      ResNet(18, 7, FIXUP, version=2, symmetric_stem=True),
      "ResNet 18 v2",
    ),
    (
      # What `convert.from_torchvision` returns.
      {"model": "resnet", "depth": 50, "version": 1, "symmetric_padding": True},
      ResNet(50, 7, FIXUP, version=1, symmetric_padding=True),
      "ResNet 50 v1",
    ),
    (
      {"model": "residual_mlp", "depth": 3, "width": 5, "layers_per_block": 2},
      ResidualMLP(3, 5, 7, FIXUP, layers_per_block=2),
      "MLP 3-5",
    ),
    (
      {"model": "vision_transformer", "depth": 3, "width": 6, "patch_size": 4}
      | {"num_heads": 2, "method": "layer_norm"},
      VisionTransformer(3, 6, 7, methods.get("layer_norm"), patch_size=4, num_heads=2),
      "Vision Transformer 3-6",
    ),
  ],
)
def test_model(fields, expected, title):
  config = TrainConfig(**{"method": "fixup", **fields})
  config.validate()
  assert config.make_model(7) == expected
  assert config.network_title == title
  changed = dataclasses.replace(
    config, scan=False, remat=True, dtype="bfloat16", param_dtype="bfloat16"
  )
  model = changed.make_model(7)
  assert (model.scan, model.remat) == (False, True)
  assert model.dtype == model.param_dtype == jnp.bfloat16


def test_identity_is_what_decides_the_result():
  fields = {field.name for field in dataclasses.fields(TrainConfig)}
  assert fields - set(TrainConfig().identity()) == {
    "data_dir",
    "data_workers",
    "shard_params",
    "checkpoint_every_seconds",
    "signal_every_steps",
    "profile_steps",
  }


def test_what_older_versions_ran():
  def stored(**fields):
    old = TrainConfig(**fields).identity()
    del old["symmetric_stem"]
    return TrainConfig.stored(old, has_record=True)

  # They trained Fixup at one rate, and had one version of ResNet by default.
  there = stored(method="fixup", model="resnet", depth=50, version=2)
  same = {"version": 2, "scale_rate_factor": 1.0, "bias_rate_factor": 1.0}
  here = TrainConfig(method="fixup", model="resnet", depth=50, **same)
  assert there == here.identity()
  assert stored(version=2) == TrainConfig().identity()
  with pytest.raises(UsageError, match="nf_resnet was another network"):
    stored(method="nf_resnet")


def test_one_place_has_many_names(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  names = ("~/a", "a", f"{tmp_path}/a/")
  made = [TrainConfig(init_from=name).identity() for name in names]
  # Also where an older version kept it as it was given.
  stored = [TrainConfig.stored({"init_from": name}, has_record=True) for name in names]
  assert all(fields == made[0] for fields in (*made, *stored))
  assert TrainConfig(init_from="b").identity() != made[0]
