"""Trained networks as files: StableHLO for use without this package, safetensors.

    program = export_model(model, variables, (32, 32, 3), preprocess=preprocess)
    pathlib.Path("model.stablehlo").write_bytes(program.serialize())

Another process needs only jax, and flatbuffers, by which jax reads the file:

    program = jax.export.deserialize(pathlib.Path("model.stablehlo").read_bytes())
    logits = program.call(images)  # uint8 [N, 32, 32, 3], any N

JAX promises to read such a file for six months of releases after the one that wrote
it (https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees).
Weights in safetensors do not age: from them a program can be exported again.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import export as jax_export

from skipinit_jax.errors import UsageError, extra
from skipinit_jax.files import local_path

__all__ = [
  "PLATFORMS",
  "export_model",
  "load_arrays",
  "load_safetensors",
  "save_safetensors",
]

PLATFORMS: tuple[str, ...] = ("cpu", "cuda", "tpu")
"""What an exported program runs on, wherever it was exported."""


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
    # safetensors writes the memory as it lies, whatever the strides.
    name: np.ascontiguousarray(value)
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
