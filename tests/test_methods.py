"""The table of methods, against the paper's description of each."""

import dataclasses
import functools
import math

import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.layers import GhostBatchNorm

SQRT_HALF = math.sqrt(0.5)

# What sets a method apart from a network with He initialization and nothing else.
# For alpha: its value in a network of 25 blocks.
PROPERTIES = {
  "batch_norm": {"normalizer": nn.BatchNorm},
  "skipinit": {"alpha": 0.0},
  "skipinit_inverse_sqrt_depth": {"alpha": 0.2},
  "skipinit_one": {"alpha": 1.0},
  "divide_by_sqrt2": {"sum_scale": SQRT_HALF},
  "unnormalized": {},
  "skipinit_biases": {"alpha": 0.0, "use_bias": True},
  "regularized_skipinit": {"alpha": 0.0, "use_bias": True, "dropout_rate": 0.2},
  "fixup": {"alpha": 1.0, "initialization": "fixup", "scalar_biases": True},
  "fixup_dropout": {
    "alpha": 1.0,
    "initialization": "fixup",
    "scalar_biases": True,
    "dropout_rate": 0.2,
  },
  "batch_norm_divide_by_sqrt2": {"normalizer": nn.BatchNorm, "sum_scale": SQRT_HALF},
  "output_batch_norm": {"normalizer": nn.BatchNorm, "output_normalizer_only": True},
}
PLAIN = {
  "normalizer": None,
  "output_normalizer_only": False,
  "alpha": None,
  "learnable_alpha": True,
  "sum_scale": 1.0,
  "initialization": "he",
  "scalar_biases": False,
  "use_bias": False,
  "dropout_rate": 0.0,
}


def test_every_promised_method_exists():
  assert set(PROPERTIES) <= set(methods.NAMES)
  assert len(set(methods.NAMES)) == len(methods.NAMES)


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name):
  method = methods.get(name)
  actual = {field: getattr(method, field) for field in PLAIN}
  actual["alpha"] = method.initial_alpha(25)
  if isinstance(method.normalizer, functools.partial):
    actual["normalizer"] = method.normalizer.func
  expected = PLAIN | PROPERTIES[name]
  assert actual.pop("sum_scale") == pytest.approx(expected.pop("sum_scale"), rel=1e-12)
  assert actual == expected


@pytest.mark.parametrize("name", methods.NAMES)
def test_name_is_the_key_and_titles_tell_methods_apart(name):
  assert methods.get(name).name == name
  titles = [methods.get(other).title for other in methods.NAMES]
  assert titles.count(methods.get(name).title) == 1


def test_only_alpha_of_inverse_sqrt_depth_depends_on_the_depth():
  changing = {
    name
    for name in methods.NAMES
    if methods.get(name).initial_alpha(4) != methods.get(name).initial_alpha(100)
  }
  assert changing == {"skipinit_inverse_sqrt_depth"}


@pytest.mark.parametrize(("num_blocks", "alpha"), [(1, 1.0), (4, 0.5), (10_000, 0.01)])
def test_inverse_sqrt_depth(num_blocks, alpha):
  assert methods.inverse_sqrt_depth(num_blocks) == pytest.approx(alpha, rel=1e-12)


def test_unknown_name_lists_all():
  with pytest.raises(UsageError, match="did you mean 'skipinit'") as caught:
    methods.get("skipnit")
  for name in methods.NAMES:
    assert name in str(caught.value)


def test_a_method_cannot_change():
  with pytest.raises(dataclasses.FrozenInstanceError):
    methods.get("skipinit").alpha = 1.0  # type: ignore[misc]


def test_a_new_method_from_a_known_one():
  known = methods.get("skipinit")
  new = dataclasses.replace(known, name="mine", alpha=lambda blocks: 3.0 / blocks)
  assert new.initial_alpha(6) == 0.5
  assert known.initial_alpha(6) == 0.0
  assert dataclasses.replace(new, alpha=0.0, name="skipinit") == known
  assert hash(known) == hash(dataclasses.replace(known))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"dropout_rate": 1.0}, r"dropout_rate is 1.0: it must be in \[0, 1\)"),
    ({"dropout_rate": -0.1}, r"dropout_rate is -0.1"),
    ({"dropout_rate": math.nan}, r"dropout_rate is nan"),
    ({"alpha": math.nan}, r"alpha is nan: it must be finite"),
    ({"alpha": np.float32("inf")}, r"alpha is inf"),
    ({"sum_scale": math.inf}, r"sum_scale is inf: it must be finite"),
    ({"initialization": "xavier"}, r"Unknown initialization 'xavier'.*fixup, he"),
    ({"output_normalizer_only": True}, r"normalizer is None"),
  ],
)
def test_bad_values(changes, message):
  with pytest.raises(UsageError, match=message):
    dataclasses.replace(methods.get("unnormalized"), **changes)


def test_ghost_batches_keep_the_normalizer_s_settings():
  method = methods.with_ghost_batches(methods.get("batch_norm"), 8)
  normalizer = method.normalizer(use_running_average=False)
  assert isinstance(normalizer, GhostBatchNorm)
  settings = methods.batch_normalizer.keywords
  assert (normalizer.momentum, normalizer.epsilon, normalizer.ghost_batch_size) == (
    settings["momentum"],
    settings["epsilon"],
    8,
  )
  for name in ("skipinit", "fixup"):
    with pytest.raises(UsageError, match=f"'{name}' has no batch normalization"):
      methods.with_ghost_batches(methods.get(name), 8)
