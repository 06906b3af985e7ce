"""Parameters cut among the devices: the same training, an eighth of the memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from skipinit_jax.training import (
  Checkpoints,
  TrainConfig,
  make_mesh,
)
from skipinit_jax.training.mesh import fsdp_sharding
from tests.training import runs
from tests.training.runs import (
  StopAt,
  assert_same_training,
  bits,
  dispatch,
  largest_change,
  rows_of,
  train,
)

# 1472 training examples make 4 steps an epoch.
MLP = TrainConfig(
  model="residual_mlp",
  depth=4,
  width=64,
  batch_size=368,
  learning_rate=0.05,
  schedule="exponential",
  growth_per_epoch=0.8,
)


def shard(config):
  return dataclasses.replace(config, shard_params=True)


def make_trainer(config, num_devices=8):
  """Returns a trainer of four steps an epoch."""
  return runs.make_trainer(config, num_devices, 4 * config.batch_size)


def assert_is_cut(state):
  """Checks that each of eight devices holds an eighth of every kernel's elements."""
  kernels = 0
  for tree in (state.params, state.opt_state):
    for path, leaf in jax.tree.leaves_with_path(tree):
      parts = [shard.data.size for shard in leaf.addressable_shards]
      # Adaptive clipping keeps a number for each.
      is_kernel = leaf.ndim > 1 and getattr(path[-1], "key", None) == "kernel"
      kernels += is_kernel
      assert parts == [leaf.size // 8 if is_kernel else leaf.size] * 8
  # As many in the momentum as in the parameters.
  assert kernels >= 6 and kernels % 2 == 0
  rest = (state.step, state.model_state, state.key_data, state.sums)
  assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(rest))


@pytest.mark.parametrize(
  ("shape", "stacked", "spec"),
  [
    ((3, 3, 16, 32), False, (None, None, None, "data")),
    ((3, 3, 32, 16), False, (None, None, "data")),
    # The largest axis of those that 8 divides.
    ((100, 16), False, (None, "data")),
    ((7, 7, 3, 10), False, ()),
    # Never the axis over the blocks, however large.
    ((800, 16, 24), True, (None, None, "data")),
    ((800, 7, 9), True, ()),
    # Vectors are whole.
    ((1024,), False, ()),
    ((800, 1024), True, ()),
  ],
)
def test_axis(shape, stacked, spec):
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  tree = {"stack": {"blocks" if stacked else "block0": {"kernel": leaf}}}
  mesh = make_mesh()
  (sharding,) = jax.tree.leaves(fsdp_sharding(tree, mesh))
  assert sharding.mesh == mesh
  assert sharding.spec == PartitionSpec(*spec)


@pytest.mark.parametrize(
  "fields",
  [
    {"method": "skipinit", "adaptive_clip": 0.1, "accumulation_steps": 2}
    | {"remat": True},
    {"method": "batch_norm", "ghost_batch_size": 23, "dropout_rate": 0.3}
    | {"clip_norm": 0.5, "scan": False},
  ],
  ids=["skipinit", "ghost_unrolled"],
)
def test_is_the_same_training(fields):
  config = dataclasses.replace(MLP, **fields)
  whole, cut = make_trainer(config), make_trainer(shard(config))
  start = cut.initial_state
  assert_is_cut(start)
  assert bits(start) == bits(whole.initial_state)
  expected, state = dispatch(whole, 3, 2), dispatch(cut, 3, 2)
  assert int(state.step) == 5
  assert_same_training(state, expected)
  # What follows steps lies as what precedes them: nothing became whole on the way.
  assert_is_cut(state)
  # The comparison would hold for steps that change nothing.
  assert largest_change(state.params, start.params) > 1e-2


def test_memory():
  config = dataclasses.replace(
    MLP, method="batch_norm", width=256, depth=16, batch_size=128
  )
  trainers = {"whole": make_trainer(config), "cut": make_trainer(shard(config))}
  stack_bytes = 16 * 256 * 256 * 4
  programs = {name: trainer._train_steps for name, trainer in trainers.items()}
  memory = {name: program.memory_analysis() for name, program in programs.items()}
  split_bytes = sum(leaf.nbytes for leaf in trainers["cut"]._source.data_shapes())
  state_bytes = {
    name: analysis.argument_size_in_bytes - split_bytes
    for name, analysis in memory.items()
  }
  # Parameters and momentum.
  assert state_bytes["whole"] > 2 * stack_bytes
  assert state_bytes["cut"] < 0.15 * state_bytes["whole"]
  # Donated: the step's result lies where its argument lay.
  for name, analysis in memory.items():
    assert analysis.alias_size_in_bytes > 0.99 * state_bytes[name]
  # Within a step only one block's parameters are whole at a time, and the gradients of
  # the stack are at no time.
  assert memory["whole"].temp_size_in_bytes > stack_bytes
  assert memory["cut"].temp_size_in_bytes < stack_bytes / 2
  # Layers gather their parameters. XLA alone would gather their features, [128, 256].
  gathered = [
    line.split(" all-gather(")[0]
    for line in programs["cut"].as_text().splitlines()
    if " all-gather(" in line
  ]
  assert any("f32[256,256]" in line for line in gathered)
  assert not any("f32[128," in line or "f32[16," in line for line in gathered)


def test_a_cut_checkpoint_is_restored_whole_on_fewer_devices(tmp_path):
  config = dataclasses.replace(MLP, method="batch_norm")
  _, saved, _ = runs.make_step(shard(config), num_devices=8)
  # The momentum starts at zero.
  saved = saved.replace(opt_state=jax.tree.map(lambda x: x + 1, saved.opt_state))
  with Checkpoints(tmp_path, config=shard(config).identity()) as checkpoints:
    checkpoints.save(3, saved)
  _, template, _ = runs.make_step(config, num_devices=4)
  with Checkpoints(tmp_path, config=config.identity()) as checkpoints:
    step, restored = checkpoints.restore_latest(template)
  assert step == 3
  assert bits(restored) == bits(saved)
  for leaf, like in zip(
    jax.tree.leaves(restored), jax.tree.leaves(template), strict=True
  ):
    assert leaf.sharding == like.sharding


RUN = dataclasses.replace(
  MLP,
  method="batch_norm",
  crop_padding=1,
  epochs=2,
  checkpoint_every_seconds=0,
  signal_every_steps=3,
)


def test_a_run_goes_on_with_other_settings(tmp_path):
  whole_dir, cut_dir = tmp_path / "whole", tmp_path / "cut"
  whole = train(RUN, whole_dir, num_devices=8)
  assert train(RUN, cut_dir, num_devices=4, stop=StopAt(2)).status == "interrupted"
  cut = train(shard(RUN), cut_dir, num_devices=8)
  assert cut.status == whole.status == "completed"
  assert cut.num_parameters == whole.num_parameters
  assert cut.config["shard_params"]
  assert cut.test_loss == pytest.approx(whole.test_loss, rel=1e-3)
  rows, expected = rows_of(cut_dir), rows_of(whole_dir)
  assert {row["kind"] for row in rows} == {"train", "eval", "signal"}
  for row, other in zip(rows, expected, strict=True):
    assert row.keys() == other.keys()
    for name in row.keys() - {"blocks", "kind"}:
      np.testing.assert_allclose(row[name], other[name], rtol=1e-3, err_msg=name)
