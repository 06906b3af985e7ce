"""Weights to begin training from: those of a run, of an export, or PyTorch's."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from skipinit_jax import convert, export
from skipinit_jax.errors import UsageError, misfit
from skipinit_jax.files import Path, reading, workdir_path
from skipinit_jax.models import scan_variables, unroll_variables
from skipinit_jax.training.trained import load_trained

_CLASSIFIER = "params/head/classifier/"
_EXPORTED = "model.safetensors"


class Weights(NamedTuple):
  """Variables of a network, all or all but the classifier.

  Attributes:
    variables: NumPy arrays.
    description: where they are from and what they lack, in words.
  """

  variables: dict[str, Any]
  description: str


def load_weights(path: str, model: nn.Module, image_shape: tuple[int, ...]) -> Weights:
  """Reads variables for a network.

  Args:
    path: a run's workdir, the folder or the safetensors file of an export, or
      PyTorch's weights by torchvision's or timm's names, as a safetensors file or as
      `torch.save` writes it. A PyTorch file is read without executing what it may hold.
    model: the network. Scanned or not, it takes the weights of either form.
    image_shape: height, width and channels.

  Returns:
    The variables. A classifier of another number of classes is left out.

  Raises:
    UsageError: nothing can be read there, or a name or shape does not fit.
  """

  def init() -> dict[str, Any]:
    images = jnp.zeros((1, *image_shape))
    return unroll_variables(model.init(jax.random.key(0), images, train=False))

  there, here = (
    traverse_util.flatten_dict(variables, sep="/")
    for variables in (unroll_variables(_read(path, model)), jax.eval_shape(init))
  )
  description = f"initialized from {path}"
  classes = [flat.get(f"{_CLASSIFIER}bias") for flat in (there, here)]
  counts = ["none" if bias is None else f"{bias.size} classes" for bias in classes]
  if counts[0] != counts[1]:
    description += f", with a new classifier: {counts[0]} there, {counts[1]} here"
    there, here = (
      {name: flat[name] for name in flat if not name.startswith(_CLASSIFIER)}
      for flat in (there, here)
    )
  # Statistics have the shapes of parameters, which say more.
  shapes = [
    {name: flat[name].shape for name in sorted(flat, key=_is_statistic)}
    for flat in (here, there)
  ]
  if problems := misfit(*shapes):
    raise UsageError(f"The weights of init_from {path} do not fit: {problems}.")
  variables = traverse_util.unflatten_dict(there, sep="/")
  if getattr(model, "scan", False):
    variables = scan_variables(variables)
  return Weights(variables, description)


def _is_statistic(name: str) -> bool:
  return not name.startswith("params/")


def _read(path: str, model: nn.Module) -> dict[str, Any]:
  """Reads variables, which need not be the model's."""
  place = workdir_path(path, "init_from")
  with reading(path):
    if not path or not place.exists():
      raise UsageError(f"init_from is {path!r}: there is no such file or directory.")
  if place.is_dir():
    if not (place / _EXPORTED).exists():
      return load_trained(place).variables
    place = place / _EXPORTED
  if place.suffix != ".safetensors":
    arrays = _read_torch(place)
  else:
    arrays = export.load_arrays(place)
    if any(name.startswith("params/") for name in arrays):
      return traverse_util.unflatten_dict(arrays, sep="/")
  _, variables = convert.from_timm(arrays)
  try:
    convert.require_timm(model)
  except UsageError as error:
    raise UsageError(f"init_from is {path}, of PyTorch's weights: {error}") from None
  return variables


def _read_torch(path: Path) -> Any:
  try:
    import torch
  except ImportError:
    raise UsageError(
      f"init_from is {path}: reading it needs PyTorch (pip install torch); a "
      ".safetensors file does not."
    ) from None
  try:
    return torch.load(path, map_location="cpu", weights_only=True)
  # What a file that is none of PyTorch's raises depends on its bytes.
  except Exception as error:
    # Its own text may advise to execute the file.
    raise UsageError(
      f"init_from is {path}: PyTorch cannot read weights alone from it "
      f"({type(error).__name__})."
    ) from None
