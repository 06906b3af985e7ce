"""Training from weights: what begins it, what stays frozen, and what is refused."""

import dataclasses
import shutil
import sys

import jax
import numpy as np
import pytest

from skipinit_jax import data, export
from skipinit_jax.data.datasets import Split
from skipinit_jax.errors import UsageError
from skipinit_jax.models import unroll_variables
from skipinit_jax.training import (
  Checkpoints,
  TrainConfig,
  load_trained,
  load_weights,
  loop,
)
from tests.training.runs import StopAt, bits, digits, make_step

SOURCE = TrainConfig(model="residual_mlp", depth=3, width=8, method="batch_norm")
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  """The workdir of a run on ten classes, and the variables that it ended with."""
  workdir = tmp_path_factory.mktemp("source")
  _, state, _ = make_step(SOURCE)
  rng = np.random.default_rng(0)

  def draw(lowest):
    return lambda leaf: rng.uniform(lowest, 1, leaf.shape).astype(leaf.dtype)

  state = state.replace(
    params=jax.tree.map(draw(-1), state.params),
    model_state=jax.tree.map(draw(0.2), state.model_state),
  )
  with Checkpoints(workdir, config=SOURCE.identity()) as checkpoints:
    checkpoints.save(5, state)
  return workdir, {"params": state.params, **state.model_state}


@pytest.mark.parametrize(
  ("form", "scan"), [("workdir", False), ("folder", True), ("file", False)]
)
def test_begins_with_the_logits_of_the_source(source, form, scan, tmp_path):
  path, variables = source
  if form != "workdir":
    file = tmp_path / "model.safetensors"
    # Scanned where the network is not, and the other way round.
    export.save_safetensors(file, unroll_variables(variables) if scan else variables)
    path = file if form == "file" else tmp_path
  config = dataclasses.replace(SOURCE, scan=scan)
  model = config.make_model(10)
  weights = load_weights(str(path), model, SHAPE)
  _, state, _ = make_step(config, weights=weights.variables)
  images = np.random.default_rng(1).normal(size=(4, *SHAPE)).astype(np.float32)
  actual = model.apply({"params": state.params, **state.model_state}, images, False)
  expected = SOURCE.make_model(10).apply(variables, images, train=False)
  assert np.ptp(expected, axis=0).max() > 0.1
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  assert weights.description == f"initialized from {path}"


def make_halves():
  """The digits, as those below five and the others."""
  splits = [
    Split(split.images, (split.labels > 4).astype(np.int32))
    for split in (digits(128).train, digits().test)
  ]
  return data.Dataset("halves", 2, *splits)


def test_a_new_head_on_frozen_weights(source, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(data.datasets, "_registered", {})
  data.register("halves", make_halves)
  _, variables = source
  there = shutil.copytree(source[0], tmp_path / "there")
  config = dataclasses.replace(
    SOURCE,
    dataset="halves",
    init_from=str(there),
    freeze=("scale", "stem,blocks/dense"),
    batch_size=32,
    epochs=2,
    clip_norm=1.0,
    l2=0.01,
    ema_decay=0.5,
  )
  loop.train(config, tmp_path / "run", stop=StopAt(2))
  lines = capsys.readouterr().err.splitlines()
  said = [line for line in lines if "initialized from" in line]
  assert len(said) == 1 and "classifier: 10 classes there, 2 classes here" in said[0]
  # From here on, the run has its own weights.
  shutil.rmtree(there)
  result = loop.train(config, tmp_path / "run", show_progress=False)
  assert (result.status, result.config["init_from"]) == ("completed", str(there))
  trained = load_trained(tmp_path / "run")
  params, before = trained.variables["params"], variables["params"]
  blocks, blocks_before = params["stack"]["blocks"], before["stack"]["blocks"]
  # Neither decay nor momentum moves what is frozen.
  assert bits(params["stem"]) == bits(before["stem"])
  assert bits(blocks["dense1"]) == bits(blocks_before["dense1"])
  assert bits(blocks["norm1"]["scale"]) == bits(blocks_before["norm1"]["scale"])
  assert np.abs(blocks["norm1"]["bias"] - blocks_before["norm1"]["bias"]).min() > 0
  assert params["head"]["classifier"]["kernel"].shape == (8, 2)
  # Statistics are no parameters.
  means = [v["batch_stats"]["head"]["norm"]["mean"] for v in (trained[1], variables)]
  assert np.abs(means[0] - means[1]).min() > 0
  # The average began with these weights too.
  average = load_trained(tmp_path / "run", averaged=True).variables["params"]
  np.testing.assert_allclose(average["stem"]["kernel"], before["stem"]["kernel"])


def test_files_of_pytorch_need_pytorch(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "a.pth").write_bytes(b"")
  with pytest.raises(UsageError, match="needs PyTorch"):
    load_weights(str(tmp_path / "a.pth"), SOURCE.make_model(10), SHAPE)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"init_from": "{tmp}/none"}, r"init_from is .*/none': there is no such file"),
    ({"init_from": "{tmp}"}, r"There is no checkpoint in "),
    ({"init_from": "{tmp}/file.safetensors"}, r"no safetensors file"),
    ({"init_from": "x" * 300}, r"xx cannot be read .File name too long"),
    ({"init_from": "s3://a/b"}, r"The init_from s3://a/b cannot be used"),
    ({"width": 16}, r"do not fit: 'params/head/classifier/kernel' has shape \(8, 10"),
    ({"method": "skipinit"}, r"blocks?.*branch_scale/alpha'.* missing, .*norm1/bias'"),
    ({"depth": 4}, r"'params/stack/block3/dense1/kernel'.* missing\.$"),
    ({"freeze": ("scale",), "scale_rate_factor": 0.5}, r"0.5: no such parameter is"),
    ({"method": "unnormalized", "l2_exempt": ("scale",)}, r"l2_exempt is .* no such"),
    ({"freeze": ("nothing",)}, r"freeze is nothing: .* head/classifier/kernel"),
    ({"freeze": ("sca(le",)}, r"freeze is sca\(le: it is no regular expression"),
    ({"freeze": ("kernel", "bias,.*")}, r"freeze is kernel,bias,\.\*: no parameter is"),
  ],
)
def test_what_does_not_fit_is_named_and_makes_no_workdir(
  source, tmp_path, fields, message
):
  (tmp_path / "file.safetensors").write_bytes(b"other")
  fields = {"init_from": str(source[0])} | fields
  fields["init_from"] = fields["init_from"].format(tmp=tmp_path)
  config = dataclasses.replace(SOURCE, **fields)
  with pytest.raises(UsageError, match=message) as error:
    loop.train(config, tmp_path / "run", show_progress=False)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()
