"""Trained networks as files: StableHLO for use without this package, safetensors.

    program = export_model(model, variables, (32, 32, 3), preprocess=preprocess)
    pathlib.Path("model.stablehlo").write_bytes(program.serialize())

Another process needs only jax, and flatbuffers, by which jax reads the file:

    program = jax.export.deserialize(pathlib.Path("model.stablehlo").read_bytes())
    logits = program.call(images)  # uint8 [N, 32, 32, 3], any N

JAX promises to read such a file for six months of releases after the one that wrote
it (https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).
Weights in safetensors do not age: from them a program can be exported again. With a
description of the network beside them, they are loaded by this package:

    save("exported", model, variables, image_shape=(32, 32, 3))
    model, variables = load("exported")

`push` and `pull` carry such a folder to and from the Hugging Face Hub.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import export as jax_export

from skipinit_jax import methods
from skipinit_jax.errors import UsageError, extra, misfit
from skipinit_jax.files import local_path, read_json, to_json, write_json
from skipinit_jax.models import registry

__all__ = [
  "PLATFORMS",
  "export_model",
  "load",
  "load_arrays",
  "load_safetensors",
  "pull",
  "push",
  "save",
  "save_safetensors",
]

PLATFORMS: tuple[str, ...] = ("cpu", "cuda", "tpu")
"""What an exported program runs on, wherever it was exported."""

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
"""What a folder holds, by the names that the Hugging Face Hub knows."""


def export_model(
  model: nn.Module,
  variables: Mapping[str, Any],
  image_shape: Sequence[int],
  *,
  preprocess: Callable[[jax.Array], jax.Array],
  platforms: Sequence[str] = PLATFORMS,
) -> jax_export.Exported:
  """Lowers a network in evaluation mode to StableHLO, with its weights as constants.

  Args:
    model: the network, called as `model(images, train)`.
    image_shape: height, width and channels.
    preprocess: maps uint8 images to the network's input, such as normalization. It
      becomes part of the program, so that nobody has to repeat it.
    platforms: what the program shall run on, by JAX's names.

  Returns:
    A program of one argument, images uint8 [batch, H, W, C] with a symbolic batch,
    that returns the logits, [batch, num_classes] float32.
  """
  # On the host, so that the program depends on no device's arrays.
  variables = jax.tree.map(np.asarray, variables)

  def logits(images: jax.Array) -> Any:
    return model.apply(variables, preprocess(images), train=False)

  (batch,) = jax_export.symbolic_shape("batch")
  images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
  return jax_export.export(jax.jit(logits), platforms=platforms)(images)


def save_safetensors(
  path: str | os.PathLike[str],
  variables: Mapping[str, Any],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes variables as safetensors.

  Args:
    path: the file, replaced if it exists.
    variables: variables of a Flax model. Names join the path with slashes, such as
      `params/stem/kernel`. Blocks of a scanned stack are one array with a leading axis
      over the blocks; `models.unroll_variables` makes them single ones.
    metadata: texts by name, for the file's header.
  """
  with extra("export"):
    import safetensors.numpy
  arrays = {
    # safetensors writes the memory as it lies, whatever the strides. NumPy's
    # `ascontiguousarray` would make an axis for a scalar.
    name: np.asarray(value, order="C")
    for name, value in traverse_util.flatten_dict(variables, sep="/").items()
  }
  # Its own `save_file` makes files that no other user may read.
  local_path(path).write_bytes(safetensors.numpy.save(arrays, dict(metadata or {})))


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads the variables that `save_safetensors` wrote.

  Returns:
    The variables as NumPy arrays, for `model.apply(variables, images, train=False)`.

  Raises:
    UsageError: the file cannot be read, is damaged, or holds no Flax variables.
  """
  arrays = load_arrays(path)
  if not any(name.startswith("params/") for name in arrays):
    raise UsageError(
      f"The file {path} holds no variables of Flax, whose names begin with params/; "
      "skipinit_jax.convert reads those of PyTorch."
    )
  variables: dict[str, Any] = traverse_util.unflatten_dict(arrays, sep="/")
  return variables


def load_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads the arrays of a safetensors file by their names, whosever they are.

  Raises:
    UsageError: the file cannot be read, or is damaged.
  """
  with extra("export"):
    import safetensors.numpy
  try:
    arrays: dict[str, np.ndarray] = safetensors.numpy.load_file(local_path(path))
  except OSError as error:
    raise UsageError(f"The file {path} cannot be read ({error}).") from None
  except safetensors.SafetensorError as error:
    raise UsageError(f"The file {path} is no safetensors file ({error}).") from None
  return arrays


def save(
  directory: str | os.PathLike[str],
  model: nn.Module,
  variables: Mapping[str, Any],
  *,
  image_shape: Sequence[int],
  description: Mapping[str, Any] | None = None,
  metadata: Mapping[str, str] | None = None,
  card: str = "",
  loadable: bool = True,
) -> None:
  """Writes a network as a folder, which `load` reads, in the Hugging Face Hub's layout.

  The folder gets the weights (model.safetensors), the network's fields (config.json)
  and a model card (README.md). What else it holds stays.

  Args:
    directory: the folder, which is made if it does not exist.
    model: a network of a class that configurations know: one of this package's, or of
      `models.register`.
    image_shape: height, width and channels.
    description: more values of JSON for config.json, such as the mean of the images.
    metadata: texts by name, for the header of the weights' file.
    card: the model card's text; empty: no card is written.
    loadable: whether to refuse a network that `load` could not make again; otherwise
      config.json says why.

  Raises:
    UsageError: the network is of another class, or has a field that no file can hold.
  """
  try:
    described = _describe(model)
  except UsageError as error:
    if loadable:
      raise
    described = {"architecture": None, "reason": str(error)}
  config = {
    "library_name": "skipinit_jax",
    **described,
    "image_shape": list(image_shape),
    **(description or {}),
  }
  folder = local_path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  save_safetensors(folder / WEIGHTS, variables, metadata)
  write_json(folder / CONFIG, config)
  if card:
    (folder / CARD).write_text(card, encoding="utf-8")


def load(directory: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
  """Reads a network that `save` or `experiments.export` wrote.

  Args:
    directory: the folder; `pull` fetches one from the Hub.

  Returns:
    The model, and its variables as NumPy arrays. The images that it takes are
    normalized as config.json says.

  Raises:
    UsageError: a file is missing, damaged or of another version, or the weights do not
      fit the network.
  """
  folder = local_path(directory)
  config = read_json(folder / CONFIG)
  try:
    if config["architecture"] is None:
      raise UsageError(f"{folder / CONFIG} describes no network: {config['reason']}")
    fields: dict[str, Any] = {
      name: tuple(value) if isinstance(value, list) else value
      for name, value in config["model"].items()
    }
    for name in fields.keys() & {"dtype", "param_dtype"}:
      fields[name] = jnp.dtype(fields[name])
    if "method" in fields:
      fields["method"] = _make_method(**fields["method"])
    model = registry.get(config["architecture"]).factory(**fields)
    images = jnp.zeros((1, *config["image_shape"]))
  except UsageError:
    raise
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise UsageError(
      f"{folder / CONFIG} describes no network of this version of skipinit_jax "
      f"({type(error).__name__}: {error})."
    ) from None
  variables = load_safetensors(folder / WEIGHTS)
  needed = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
  shapes = [
    {
      name: leaf.shape
      for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()
    }
    for tree in (needed, variables)
  ]
  if problems := misfit(*shapes):
    raise UsageError(f"The weights in {folder} do not fit the network: {problems}.")
  return model, variables


def push(directory: str | os.PathLike[str], name: str, *, private: bool = True) -> str:
  """Uploads a folder to the Hugging Face Hub, which huggingface_hub is logged in to.

  Args:
    directory: a folder with a network.
    name: the repository, such as "user/network", which is made if it does not exist.
    private: whether a new repository is private.

  Returns:
    The repository's address.

  Raises:
    UsageError: the folder holds no network, huggingface_hub is missing, or the Hub
      refuses or cannot be reached.
  """
  folder = local_path(directory)
  for file in (WEIGHTS, CONFIG):
    if not (folder / file).is_file():
      raise UsageError(f"There is no file {folder / file} to push.")
  with _hub(name) as hub:
    api = hub.HfApi()
    address = api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=str(folder))
  return str(address)


def pull(name: str, revision: str | None = None) -> str:
  """Downloads a network from the Hugging Face Hub, unless it is in the cache there.

  Args:
    name: the repository, such as "user/network".
    revision: a branch, tag or commit; None: the newest commit.

  Returns:
    The folder, for `load`. Nothing in it is executed.

  Raises:
    UsageError: huggingface_hub is missing, or the Hub refuses or cannot be reached.
  """
  with _hub(name) as hub:
    patterns = [WEIGHTS, CONFIG, CARD]
    return str(hub.snapshot_download(name, revision=revision, allow_patterns=patterns))


@contextlib.contextmanager
def _hub(name: str) -> Iterator[Any]:
  """Imports huggingface_hub, and makes its errors in the block a `UsageError`."""
  with extra("hub"):
    import huggingface_hub
  try:
    yield huggingface_hub
  except Exception as error:  # Its own and the network's have no other class in common.
    reason = (str(error).split("\n")[0] or type(error).__name__).rstrip(".")
    raise UsageError(f"{name} on the Hugging Face Hub cannot be used: {reason}.") from (
      error
    )


def _describe(model: Any) -> dict[str, Any]:
  """Returns the name of a network's kind and its fields, as values of JSON."""
  kinds = [n for n in registry.known_names() if registry.get(n).factory is type(model)]
  if not kinds:
    raise UsageError(
      f"The network is a {type(model).__name__}, and no file can hold that: it must be "
      "a class that `models.register` knows."
    )
  fields = {
    field.name: getattr(model, field.name)
    for field in dataclasses.fields(model)
    if field.name not in ("parent", "name")
  }
  for name in fields.keys() & {"dtype", "param_dtype"}:
    fields[name] = jnp.dtype(fields[name]).name
  if "method" in fields:
    fields["method"] = _describe_method(methods.get(fields["method"]))
  for name, value in fields.items():
    _require_plain(f"{name} of the network", value)
  return {"architecture": kinds[0], "model": fields}


def _describe_method(method: methods.Method) -> dict[str, Any]:
  """Returns a method's name, and what differs from the method of that name."""
  known = methods.get(method.name)
  described: dict[str, Any] = {"name": method.name}
  for field in dataclasses.fields(method):
    value = getattr(method, field.name)
    if value == getattr(known, field.name):
      continue
    ghost = getattr(value, "keywords", {}).get("ghost_batch_size")
    if ghost is not None:
      described["ghost_batch_size"] = ghost
      continue
    _require_plain(
      f"{field.name} of method {method.name!r}, which is not that of its name,", value
    )
    described[field.name] = value
  return described


def _require_plain(what: str, value: Any) -> None:
  try:
    json.dumps(to_json(value))
  except TypeError:
    raise UsageError(f"{what} is {value!r}, and no file can hold that.") from None


def _make_method(
  name: str, ghost_batch_size: int | None = None, **fields: Any
) -> methods.Method:
  method = dataclasses.replace(methods.get(name), **fields)
  if ghost_batch_size is None:
    return method
  return methods.with_ghost_batches(method, ghost_batch_size)
