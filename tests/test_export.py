"""Programs and weights as files, read back by other means than they were written."""

import dataclasses
import inspect
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import linen as nn

from skipinit_jax import export, methods, models
from skipinit_jax.errors import UsageError
from skipinit_jax.files import read_json, write_json
from skipinit_jax.models import (
  ResidualMLP,
  ResNet,
  VisionTransformer,
  WideResNet,
  registry,
)

MODELS = {
  # Its last stage's images are smaller than its kernels.
  "wide_resnet": (WideResNet(16, 1, 4, methods.get("batch_norm")), (8, 6, 3)),
  "unrolled": (WideResNet(10, 1, 4, methods.get("fixup"), scan=False), (8, 8, 1)),
  "mlp": (
    ResidualMLP(5, 6, 4, methods.get("skipinit_one"), dtype=jnp.bfloat16),
    (3, 2, 1),
  ),
  "transformer": (
    VisionTransformer(2, 8, 4, methods.get("layer_norm"), num_heads=2),
    (4, 6, 2),
  ),
}


def make_variables(model, image_shape):
  """Variables of the model's shapes, none at a value that hides its place."""
  images = np.zeros((1, *image_shape), np.float32)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == "kernel":
      return rng.normal(0, 0.2, leaf.shape).astype(np.float32)
    return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

  return jax.tree.map_with_path(draw, shapes)


def preprocess(images):
  return images.astype(jnp.float32) / 100 - 1


def make_images(image_shape):
  return np.random.default_rng(3).integers(0, 256, (3, *image_shape), dtype=np.uint8)


@pytest.mark.parametrize("name", MODELS)
def test_program_has_the_logits_of_the_model_at_any_batch_size(name):
  model, image_shape = MODELS[name]
  variables = make_variables(model, image_shape)
  exported = export.export_model(model, variables, image_shape, preprocess=preprocess)
  program = jax.export.deserialize(bytes(exported.serialize()))
  # Lowering for these is a part of exporting.
  assert program.platforms == ("cpu", "cuda", "tpu")
  assert program.in_avals[0].dtype == np.uint8
  assert program.out_avals[0].dtype == np.float32
  images = make_images(image_shape)
  inputs = images.astype(np.float32) / 100 - 1
  expected = jax.jit(model.apply, static_argnames="train")(
    variables, inputs, train=False
  )
  assert np.std(expected) > 0.01
  tolerance = (1e-5 if model.dtype == jnp.float32 else 1e-2) * np.abs(expected).max()
  for number in (1, 3):
    actual = program.call(images[:number])
    np.testing.assert_allclose(actual, expected[:number], rtol=0, atol=tolerance)


def test_safetensors_both_ways(tmp_path):
  model, image_shape = MODELS["wide_resnet"]
  variables = make_variables(model, image_shape)
  head = variables["params"]["head"]["classifier"]
  # In another order in memory, and of a type that NumPy itself lacks.
  head["kernel"] = np.asfortranarray(head["kernel"])
  head["bias"] = jnp.asarray(head["bias"], jnp.bfloat16)
  path = tmp_path / "model.safetensors"
  export.save_safetensors(path, variables, {"step": "23"})

  with safetensors.safe_open(path, framework="np") as file:
    assert file.metadata() == {"step": "23"}
    names = set(file.keys())
    kernel = file.get_tensor("params/stage3_rest/blocks/conv2/kernel")
  assert {"params/stem/kernel", "batch_stats/head/norm/var"} < names
  assert kernel.shape == (1, 3, 3, 64, 64)
  np.testing.assert_array_equal(
    kernel, variables["params"]["stage3_rest"]["blocks"]["conv2"]["kernel"]
  )

  loaded = export.load_safetensors(path)
  assert jax.tree.structure(loaded) == jax.tree.structure(variables)
  for actual, expected in zip(
    jax.tree.leaves(loaded), jax.tree.leaves(variables), strict=True
  ):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
  # As any file of this user: safetensors' own are for no other user to read.
  (tmp_path / "other").touch()
  assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_bad_safetensors(tmp_path):
  path = tmp_path / "model.safetensors"
  with pytest.raises(UsageError, match=f"The file {path} cannot be read"):
    export.load_safetensors(path)
  for content in (b"", b"no safetensors at all"):
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"The file {path} is no safetensors file"):
      export.load_safetensors(path)
  safetensors.numpy.save_file({"conv1.weight": np.zeros(3)}, path)
  with pytest.raises(UsageError, match=r"names begin with params/; skipinit_jax.conv"):
    export.load_safetensors(path)


CHANGED = methods.with_ghost_batches(
  dataclasses.replace(methods.get("batch_norm"), dropout_rate=0.5, alpha=0.5), 16
)


@pytest.mark.parametrize(
  ("model", "image_shape"),
  [*MODELS.values(), (ResNet(18, 3, CHANGED, version=1), (32, 32, 3))],
  ids=[*MODELS, "changed"],
)
def test_folder_is_the_network_again(model, image_shape, tmp_path):
  variables = make_variables(model, image_shape)
  folder = tmp_path / "a" / "b"
  export.save(folder, model, variables, image_shape=image_shape, card="# A card")
  assert {path.name for path in folder.iterdir()} == {
    "model.safetensors",
    "config.json",
    "README.md",
  }
  again, loaded = export.load(folder)
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)
  for field in dataclasses.fields(model):
    if field.name not in ("method", "parent"):
      assert getattr(again, field.name) == getattr(model, field.name)
  for field in dataclasses.fields(model.method):
    pair = getattr(again.method, field.name), getattr(model.method, field.name)
    assert pair[0] == pair[1] or pair[0].keywords == pair[1].keywords


def test_bad_folders(tmp_path):
  model, image_shape = MODELS["mlp"]
  variables = make_variables(model, image_shape)

  def load(change):
    export.save(tmp_path, model, variables, image_shape=image_shape)
    change(tmp_path / "config.json")
    export.load(tmp_path)

  def edit(**changes):
    return lambda path: write_json(path, read_json(path) | changes)

  for change, message in (
    (lambda path: path.unlink(), "There is no file .*config.json"),
    (lambda path: path.write_text("{"), "config.json is damaged"),
    (edit(architecture="bert"), "Unknown model 'bert'"),
    (edit(model={}), "no network of this version"),
    (edit(image_shape=[5, 5, 1]), r"do not fit the network: .* has shape \(6, 6\)"),
    (edit(model={"method": {"name": "me"}}), "Unknown method 'me'"),
  ):
    with pytest.raises(UsageError, match=message):
      load(change)
  method = dataclasses.replace(model.method, activation=jnp.tanh)
  with pytest.raises(UsageError, match=r"activation of method .* no file can hold"):
    export.save(
      tmp_path, model.clone(method=method), variables, image_shape=image_shape
    )
  with pytest.raises(UsageError, match=r"network is a Dense, .* `models.register` kno"):
    export.save(tmp_path, nn.Dense(3), {}, image_shape=(3,))
  # A run may be of such a network, and is exported all the same.
  export.save(tmp_path, nn.Dense(3), variables, image_shape=(3,), loadable=False)
  with pytest.raises(UsageError, match=r"describes no network: The network is a Dense"):
    export.load(tmp_path)


def test_networks_of_ones_own(tmp_path, monkeypatch):
  class Mine(nn.Module):
    num_classes: int
    sizes: tuple[int, ...] = (3,)

    @nn.compact
    def __call__(self, images, train):
      for size in self.sizes:
        images = nn.relu(nn.Conv(size, (3, 3))(images))
      return nn.Dense(self.num_classes)(images.mean((1, 2)))

  monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
  models.register("mine", Mine)
  model = Mine(2, sizes=(4, 5))
  variables = make_variables(model, (4, 4, 1))
  export.save(tmp_path, model, variables, image_shape=(4, 4, 1))
  again, loaded = export.load(tmp_path)
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_hub(tmp_path, monkeypatch):
  # A folder stands in for the Hub, with what is used of huggingface_hub's interface.
  hub, seen = tmp_path / "hub", []

  class Api:
    def create_repo(self, repo_id, *, private=None, exist_ok=False):
      if repo_id.count("/") != 1:
        raise ValueError(f"Repo id {repo_id} is bad.\nMore")
      assert exist_ok
      (hub / repo_id).mkdir(parents=True, exist_ok=True)
      seen.append(private)
      return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path):
      shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)

  def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
    if not (hub / repo_id).exists():
      raise RuntimeError("404 Client Error.")
    assert revision == "main"
    target = tmp_path / "cache"
    for pattern in allow_patterns:
      for path in (hub / repo_id).glob(pattern):
        target.mkdir(exist_ok=True)
        shutil.copy(path, target)
    return str(target)

  stub = types.SimpleNamespace(HfApi=Api, snapshot_download=snapshot_download)
  model, image_shape = MODELS["mlp"]
  variables = make_variables(model, image_shape)
  export.save(tmp_path / "mine", model, variables, image_shape=image_shape)
  (tmp_path / "mine" / "evil.py").write_text("")
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(UsageError, match=r"not installed: pip install .*\[hub\]"):
    export.push(tmp_path / "mine", "me/net")
  monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
  assert export.push(tmp_path / "mine", "me/net") == "https://huggingface.co/me/net"
  assert seen == [True]
  folder = export.pull("me/net", "main")
  _, loaded = export.load(folder)
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)
  assert not list(tmp_path.glob("cache/*.py"))
  with pytest.raises(UsageError, match=r"Hub cannot be used: Repo id a is bad\.$"):
    export.push(tmp_path / "mine", "a")
  with pytest.raises(UsageError, match=r"me/other on the .* used: 404 Client Error"):
    export.pull("me/other")
  with pytest.raises(UsageError, match=r"There is no file .* to push"):
    export.push(tmp_path, "me/net")


def test_stub_is_as_the_package():
  hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
  inspect.signature(hub.HfApi.create_repo).bind(
    None, "a/b", private=True, exist_ok=True
  )
  inspect.signature(hub.HfApi.upload_folder).bind(None, repo_id="a/b", folder_path="c")
  inspect.signature(hub.snapshot_download).bind(
    "a/b", revision=None, allow_patterns=["c"]
  )
