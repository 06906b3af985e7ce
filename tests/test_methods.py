"""The table of methods, against the paper's description of each."""

import dataclasses
import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.layers import (
  GhostBatchNorm,
  LayerScale,
  VarianceScaling,
  WeightStandardizedConv,
  WeightStandardizedDense,
  fixup,
  he_normal_fan_out,
  identity,
  scaled_relu,
)

SQRT_HALF = math.sqrt(0.5)
FIXUP = {
  "alpha": 1.0,
  "kernel_init": he_normal_fan_out,
  "branch_init": fixup,
  "last_init": nn.initializers.zeros,
  "classifier_init": nn.initializers.zeros,
  "scalar_biases": True,
  "resnet_version": 1,
  "scale_rate_factor": 0.1,
  "bias_rate_factor": 0.1,
}

# What sets a method apart from a network with He initialization and nothing else.
# For alpha: its value in a network of 25 blocks.
PROPERTIES = {
  "batch_norm": {"normalizer": GhostBatchNorm},
  "batch_norm_zero_scale": {"normalizer": GhostBatchNorm, "zero_last_scale": True},
  "skipinit": {"alpha": 0.0},
  "skipinit_inverse_sqrt_depth": {"alpha": 0.2},
  "skipinit_one": {"alpha": 1.0},
  "divide_by_sqrt2": {"sum_scale": SQRT_HALF},
  "unnormalized": {},
  "skipinit_biases": {"alpha": 0.0, "use_bias": True},
  "regularized_skipinit": {"alpha": 0.0, "use_bias": True, "dropout_rate": 0.2},
  "fixup": FIXUP,
  "fixup_dropout": FIXUP | {"dropout_rate": 0.2},
  "batch_norm_divide_by_sqrt2": {"normalizer": GhostBatchNorm, "sum_scale": SQRT_HALF},
  "output_batch_norm": {"output_normalizer": GhostBatchNorm},
  # Brock, De & Smith (2021).
  "nf_resnet": {
    "alpha": 0.0,
    "branch_factor": 0.2,
    "divide_by_expected_std": True,
    "conv": WeightStandardizedConv,
    "dense": WeightStandardizedDense,
    "activation": scaled_relu,
    "kernel_init": VarianceScaling(1.0),
    "use_bias": True,
    "stem_bias": True,
  },
  "layer_norm": {"normalizer": nn.LayerNorm},
  "rezero": {"alpha": 0.0},
  "layer_scale": {"alpha": 0.1, "branch_scale": LayerScale},
}
PLAIN = {
  field.name: field.default
  for field in dataclasses.fields(methods.Method)
  if field.name not in ("name", "title")
}


@pytest.mark.parametrize("name", methods.NAMES)
def test_properties(name):
  method = methods.get(name)
  actual = {field: getattr(method, field) for field in PLAIN}
  actual["alpha"] = method.initial_alpha(25)
  for field in ("normalizer", "output_normalizer"):
    if isinstance(actual[field], functools.partial):
      actual[field] = actual[field].func
  expected = PLAIN | PROPERTIES[name]
  if name == "nf_resnet":
    kernel = actual.pop("classifier_init")(jax.random.key(0), (200, 100))
    np.testing.assert_allclose(kernel.std(), 0.01, rtol=0.03)
    expected.pop("classifier_init")
  assert actual.pop("sum_scale") == pytest.approx(expected.pop("sum_scale"), rel=1e-12)
  assert actual == expected


def test_names_are_keys_and_titles_tell_methods_apart():
  table = [methods.get(name) for name in methods.NAMES]
  assert [method.name for method in table] == list(methods.NAMES)
  assert len({method.title for method in table}) == len(table)


@pytest.mark.parametrize(
  ("num_blocks", "initial_value"),
  [(1, 0.1), (36, 0.1), (38, 1e-5), (48, 1e-5), (50, 1e-6), (1000, 1e-6)],
)
def test_layer_scale_by_depth(num_blocks, initial_value):
  # Touvron et al. (2021) give the value up to 18, at 24 and beyond, in layers of two.
  assert methods.get("layer_scale").initial_alpha(num_blocks) == initial_value


def test_expected_variances():
  """For NF-ResNets see test_normalizer_free.py; others do as their second moments."""
  np.testing.assert_allclose(
    methods.get("divide_by_sqrt2").expected_variances([False] * 4), 1
  )
  # What is learnable counts as one, and what is constant by its value.
  skipinit = methods.get("skipinit")
  np.testing.assert_allclose(skipinit.expected_variances([False] * 3), [1, 2, 3])
  constant = dataclasses.replace(skipinit, learnable_alpha=False)
  np.testing.assert_allclose(constant.expected_variances([False, True]), 1)


@pytest.fixture
def registry(monkeypatch):
  """The table, which is as before when the test has ended."""
  monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))
  monkeypatch.setattr(methods, "NAMES", methods.NAMES)


MINE = {"name": "mine", "title": "Mine"}


@pytest.mark.usefixtures("registry")
def test_register():
  before = methods.NAMES
  mine = dataclasses.replace(methods.get("skipinit"), name="mine", title="Mine")
  methods.register(mine)
  assert methods.get("mine") is mine
  assert (*before, "mine") == methods.NAMES
  with pytest.raises(UsageError, match="did you mean 'mine'"):
    methods.get("mein")


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"title": "Mine"}, "name is 'skipinit', which is that of another method"),
    ({"name": "mine"}, "title is 'SkipInit, α = 0', which is that of another method"),
    ({**MINE, "name": "../../../outside"}, "name of a method is '../"),
    ({**MINE, "name": ""}, "name of a method is ''"),
    ({**MINE, "name": None}, "name is None: it must be a name"),
    ({**MINE, "name": "é" * 101}, "name of a method is 'é"),
    ({**MINE, "name": "mine\n"}, "name of a method is 'mine"),
    ({**MINE, "title": " "}, "title of a method is ' '"),
    ({**MINE, "title": "_left out of legends"}, "title of a method is '_"),
    ({**MINE, "normalizer": "batch"}, "normalizer is 'batch': .* class or function"),
    ({**MINE, "normalizer": nn.LayerNorm()}, "give its class, LayerNorm, or"),
    ({**MINE, "branch_scale": 0.5}, r"partial\(layers.SkipInit, 0.5\)"),
    ({**MINE, "activation": "relu"}, "activation .* must be a function"),
    ({**MINE, "alpha": jnp.ones(())}, "alpha is Array.* must be a finite number"),
    ({**MINE, "alpha": lambda blocks: jnp.ones(())}, "alpha of 64 blocks is Array"),
    ({**MINE, "sum_scale": "1"}, "sum_scale is '1'"),
  ],
)
def test_what_cannot_be_a_method_of_its_own_is_refused(changes, message):
  before = methods.NAMES
  with pytest.raises(UsageError, match=message):
    methods.register(dataclasses.replace(methods.get("skipinit"), **changes))
  assert before == methods.NAMES


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"dropout_rate": 1.0}, r"dropout_rate is 1.0: it must be in \[0, 1\)"),
    ({"dropout_rate": -0.1}, r"dropout_rate is -0.1"),
    ({"dropout_rate": math.nan}, r"dropout_rate is nan"),
    ({"alpha": math.nan}, r"alpha is nan: it must be a finite number"),
    ({"alpha": np.float32("inf")}, r"alpha is .*inf"),
    ({"sum_scale": True}, r"sum_scale is True: it must be a number"),
    ({"alpha": fractions.Fraction(1, 2)}, r"alpha is Fraction"),
    ({"sum_scale": math.inf}, r"sum_scale is inf: it must be a finite number"),
    ({"zero_last_scale": True}, "zero_last_scale is True, but .* has no normalizer"),
  ],
)
def test_bad_values(changes, message):
  with pytest.raises(UsageError, match=message):
    dataclasses.replace(methods.get("unnormalized"), **changes)


@pytest.mark.parametrize(
  ("name", "field"),
  [("batch_norm", "normalizer"), ("output_batch_norm", "output_normalizer")],
)
def test_ghost_batches_keep_the_normalizer_s_settings(name, field):
  method = methods.get(name)
  ghost = methods.with_ghost_batches(method, 8)
  module = getattr(ghost, field)(use_running_average=False)
  assert isinstance(module, GhostBatchNorm)
  settings = methods.batch_normalizer.keywords
  assert (module.momentum, module.epsilon, module.ghost_batch_size) == (
    settings["momentum"],
    settings["epsilon"],
    8,
  )
  assert dataclasses.replace(ghost, **{field: methods.batch_normalizer}) == method


def test_ghost_batches_need_batch_norm():
  with pytest.raises(UsageError, match="'layer_norm' has no batch normalization"):
    methods.with_ghost_batches("layer_norm", 8)


@pytest.mark.parametrize("name", methods.NAMES)
def test_linear_networks_keep_the_second_moment(name):
  method = methods.linear(methods.get(name))
  assert method.activation is identity
  fields = method.activated_block_fields(
    num_blocks=9, branch_layers=3, train=True, dtype=np.float32, param_dtype=np.float32
  )
  kernel = fields["kernel_init"](jax.random.key(0), (400, 300))
  np.testing.assert_allclose(400 * kernel.var(), 1, rtol=0.02)
  last = fields["last_kernel_init"](jax.random.key(0), (400, 300))
  assert np.any(last) == (not name.startswith("fixup"))
