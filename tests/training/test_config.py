import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax import data, methods
from skipinit_jax.errors import UsageError
from skipinit_jax.layers import GhostBatchNorm
from skipinit_jax.models import ResidualMLP, ResNet, VisionTransformer, WideResNet
from skipinit_jax.training import config as config_lib
from skipinit_jax.training.config import TrainConfig


def message_of(num_devices=1, **fields):
  """Returns the error of a configuration, after checking that it is one sentence."""
  with pytest.raises(UsageError) as caught:
    TrainConfig(**fields).validate(num_devices)
  message = str(caught.value)
  assert "\n" not in message
  assert message[0].isupper() or message.split()[0] in dir(TrainConfig)
  assert re.search(r"[^.]\.$", message)
  # A period inside is one of a number.
  assert not re.search(r"\. ", message)
  return message


@pytest.mark.parametrize(
  ("field", "value", "known"),
  [
    ("dataset", "mnist", data.NAMES),
    ("model", "transformer", config_lib.MODELS),
    ("method", "batchnorm", methods.NAMES),
    ("schedule", "linear", config_lib.SCHEDULES),
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


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite_and_not_negative(name):
  for value in (-1, -0.5, np.float32(-2)):
    assert message_of(**{name: value}).startswith(f"{name} is {value}: it must be ")
  if NUMBERS[name] in (float, float | None):
    for value in (math.nan, math.inf, -math.inf):
      message = f"{name} is {value}: it must be finite and not negative."
      assert message_of(**{name: value}) == message


@pytest.mark.parametrize(
  "name",
  [
    "accumulation_steps",
    "adaptive_clip",
    "batch_size",
    "clip_norm",
    "epochs",
    "eval_every_epochs",
    "ghost_batch_size",
    "growth_per_epoch",
    "halve_every_epochs",
  ],
)
def test_zero_where_it_has_no_meaning(name):
  assert message_of(**{name: 0}).startswith(f"{name} is 0: it must be ")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"momentum": 1.0}, "momentum is 1.0: it must be below 1."),
    (
      {"method": "batch_norm", "learnable_alpha": False},
      "learnable_alpha is False, but method 'batch_norm' has no alpha: set it.",
    ),
    ({"dropout_rate": 1.0}, "dropout_rate is 1.0: it must be below 1."),
    ({"seed": 2**32}, "seed is 4294967296: it must be below 2^32."),
    (
      {"model": "wide_resnet", "symmetric_padding": True},
      "symmetric_padding is True: it is a choice of model 'resnet', not of "
      "'wide_resnet'.",
    ),
    (
      {"schedule": "cosine", "epochs": 3, "warmup_epochs": 3.0},
      "warmup_epochs is 3.0: it must be below epochs, which is 3.",
    ),
  ],
)
def test_upper_bounds(fields, message):
  assert message_of(**fields) == message


def test_bounds_themselves_are_allowed():
  TrainConfig(
    learning_rate=0.0,
    momentum=0.0,
    l2=0,
    dropout_rate=0.0,
    seed=2**32 - 1,
    l2_exempt=("kernel", "scale", "bias"),
    checkpoint_every_seconds=0,
    # Another schedule has no warm-up.
    warmup_epochs=1e9,
  ).validate()


@pytest.mark.parametrize(
  ("num_devices", "fields", "message"),
  [
    (
      1,
      {"batch_size": 64, "accumulation_steps": 3},
      "batch_size 64 is not a multiple of accumulation_steps 3.",
    ),
    (
      8,
      {"batch_size": 36},
      "batch_size is 36: it is not a multiple of the 8 devices.",
    ),
    (
      # The batch divides, its parts do not.
      8,
      {"batch_size": 48, "accumulation_steps": 4},
      "batch_size / accumulation_steps is 12: it is not a multiple of the 8 devices.",
    ),
    (
      1,
      {"batch_size": 48, "ghost_batch_size": 32, "method": "batch_norm"},
      "batch_size is 48: it is not a multiple of ghost_batch_size 32.",
    ),
    (
      1,
      {
        "batch_size": 64,
        "accumulation_steps": 4,
        "ghost_batch_size": 32,
        "method": "batch_norm",
      },
      "batch_size / accumulation_steps is 16: it is not a multiple of "
      "ghost_batch_size 32.",
    ),
    (
      # 24 = 2 devices x 12 = 3 ghost batches of 8: the second has 4 on each device.
      2,
      {"batch_size": 24, "ghost_batch_size": 8, "method": "batch_norm"},
      "ghost_batch_size 8 would cross devices: it neither divides the 12 examples of "
      "a device nor is a multiple of them.",
    ),
    (
      1,
      {"ghost_batch_size": 8, "method": "skipinit"},
      "ghost_batch_size is 8, but method 'skipinit' has no batch normalization.",
    ),
    (
      1,
      {"batch_size": 4, "accumulation_steps": 4, "signal_every_steps": 1},
      "batch_size / accumulation_steps is 1: signal_every_steps measures variances "
      "over it and needs at least 2 examples.",
    ),
  ],
)
def test_batch_that_does_not_divide(num_devices, fields, message):
  assert message_of(num_devices, **fields) == message


@pytest.mark.parametrize(
  ("num_devices", "batch_size", "accumulation_steps", "ghost_batch_size"),
  [
    (8, 64, 1, None),
    (2, 32, 1, 8),
    # Whole devices form a ghost batch where it does not fit on one.
    (8, 64, 1, 16),
    (8, 64, 1, 64),
    (2, 64, 2, 16),
    (8, 64, 8, None),
  ],
)
def test_batch_that_divides(
  num_devices, batch_size, accumulation_steps, ghost_batch_size
):
  TrainConfig(
    method="output_batch_norm",
    batch_size=batch_size,
    accumulation_steps=accumulation_steps,
    ghost_batch_size=ghost_batch_size,
  ).validate(num_devices)


def test_method_with_dropout():
  method = TrainConfig(method="regularized_skipinit", dropout_rate=0.6).make_method()
  named = methods.get("regularized_skipinit")
  assert named.dropout_rate != 0.6
  assert method == dataclasses.replace(named, dropout_rate=0.6)
  # Zero is a rate, not the absence of one.
  assert TrainConfig(
    method="regularized_skipinit", dropout_rate=0.0
  ).make_method() == dataclasses.replace(named, dropout_rate=0.0)


def test_method_with_alpha():
  config = TrainConfig(method="batch_norm", alpha=0.0, learnable_alpha=False)
  # Zero is a value, not the absence of one.
  assert config.make_method() == dataclasses.replace(
    methods.get("batch_norm"), alpha=0.0, learnable_alpha=False
  )
  constant = TrainConfig(method="skipinit_inverse_sqrt_depth", learnable_alpha=False)
  assert constant.make_method().initial_alpha(16) == 0.25


def test_method_with_ghost_batches():
  method = TrainConfig(method="batch_norm", ghost_batch_size=16).make_method()
  ghost = method.normalizer(use_running_average=False)
  full = methods.get("batch_norm").normalizer(use_running_average=False)
  assert isinstance(ghost, GhostBatchNorm)
  assert ghost.ghost_batch_size == 16
  assert (ghost.momentum, ghost.epsilon) == (full.momentum, full.epsilon)
  assert method.title == methods.get("batch_norm").title


@pytest.mark.parametrize(
  ("fields", "expected"),
  [
    ({"depth": 10, "width": 2}, WideResNet(10, 2, 7, methods.get("fixup"))),
    (
      {"model": "resnet", "depth": 101, "version": 1},
      ResNet(101, 7, methods.get("fixup"), version=1),
    ),
    # What `convert.from_torchvision` returns.
    (
      {"model": "resnet", "depth": 50, "version": 1, "symmetric_padding": True},
      ResNet(50, 7, methods.get("fixup"), version=1, symmetric_padding=True),
    ),
    (
      {"model": "residual_mlp", "depth": 3, "width": 5, "layers_per_block": 2},
      ResidualMLP(3, 5, 7, methods.get("fixup"), layers_per_block=2),
    ),
    (
      {"model": "vision_transformer", "depth": 3, "width": 6, "patch_size": 4}
      | {"num_heads": 2, "method": "layer_norm"},
      VisionTransformer(3, 6, 7, methods.get("layer_norm"), patch_size=4, num_heads=2),
    ),
  ],
)
def test_model(fields, expected):
  config = TrainConfig(**{"method": "fixup", **fields})
  config.validate()
  assert config.make_model(7) == expected
  changed = dataclasses.replace(
    config, scan=False, remat=True, dtype="bfloat16", param_dtype="bfloat16"
  )
  model = changed.make_model(7)
  assert (model.scan, model.remat) == (False, True)
  assert model.dtype == model.param_dtype == jnp.bfloat16


def test_identity_is_what_decides_the_result():
  config = TrainConfig()
  assert dataclasses.replace(config, data_dir="/x").identity() == config.identity()
  assert dataclasses.replace(config, seed=7).identity() != config.identity()
  fields = {field.name for field in dataclasses.fields(TrainConfig)}
  assert fields - set(config.identity()) == {
    "data_dir",
    "data_workers",
    "shard_params",
    "checkpoint_every_seconds",
    "signal_every_steps",
  }


def test_networks_are_named_as_in_the_paper():
  def title(**fields):
    return TrainConfig(**fields).network_title

  assert title(depth=16, width=4) == "Wide-ResNet 16-4"
  assert title(model="residual_mlp", depth=5, width=7) == "MLP 5-7"
  assert title(model="resnet", depth=50) == "ResNet 50 v2"
  transformer = {"model": "vision_transformer", "depth": 64, "width": 32}
  assert title(**transformer) == "Vision Transformer 64-32"
