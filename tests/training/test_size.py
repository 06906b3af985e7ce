import contextlib
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.training import TrainConfig, make_mesh
from skipinit_jax.training import size as size_module
from skipinit_jax.training.size import check_size, num_parameters

SHAPE = (8, 8, 1)


@pytest.mark.parametrize(
  "fields",
  [
    {"depth": 28, "scan": False},
    {"depth": 34, "method": "fixup"},
    {"model": "residual_mlp", "width": 3, "depth": 31, "layers_per_block": 26},
    {"model": "vision_transformer", "width": 8, "depth": 29},
  ],
  ids=lambda fields: fields.get("model", "wide_resnet"),
)
def test_counts_what_a_network_has(fields, monkeypatch):
  # As for networks of millions of layers: from those of two small ones.
  monkeypatch.setattr(size_module, "_MOST", 24)
  model = TrainConfig(**fields).make_model(10)
  init = functools.partial(model.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, *SHAPE)))
  leaves = jax.tree.leaves(shapes["params"])
  expected = sum(math.prod(leaf.shape) for leaf in leaves)
  num_parameters.cache_clear()
  assert num_parameters(model, SHAPE) == expected


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"width": 2**31 - 1}, r"has 787,454,610,292,011,031,498,528 parameters, "),
    ({"model": "residual_mlp", "layers_per_block": 2**31 - 1}, r"GiB of memory: use a"),
    ({"depth": 600000004, "scan": False, "method": "nf_resnet"}, r"GiB of memory: use"),
    ({"crop_padding": 2**31 - 1}, r"of shape \(4294967302, 4294967302, 1\), which"),
    ({"epochs": 2**31 - 1}, r"epochs is 2147483647, which are 49,392,123,881 steps"),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_refused(fields, message):
  config = TrainConfig(**fields)
  with pytest.raises(UsageError, match=message):
    check_size(config, config.make_model(10), SHAPE, config.epochs * 23, make_mesh())


def test_the_memory_is_that_of_the_device(monkeypatch):
  config = TrainConfig(model="residual_mlp", width=100, depth=10)
  model, mesh = config.make_model(10), make_mesh(jax.devices()[:2])
  # Stem, ten blocks and classifier; with gradient and velocity, of four bytes each.
  needed = (64 * 100 + 10 * (100 * 100 + 1) + 101 * 10) * 3 * 4
  for memory, changes, fits in (
    (needed, {}, True),
    (needed - 1, {}, False),
    (needed - 1, {"momentum": 0.0}, True),
    (needed // 2, {"shard_params": True}, True),
    (needed // 2 - 1, {"shard_params": True}, False),
  ):
    monkeypatch.setattr(size_module, "_memory", lambda _, memory=memory: memory)
    changed = dataclasses.replace(config, **changes)
    refused = pytest.raises(UsageError, match="has 107,420 parameters")
    with contextlib.nullcontext() if fits else refused:
      check_size(changed, model, SHAPE, 230, mesh)
