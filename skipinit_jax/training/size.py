"""What a run needs of memory at least, known before anything is compiled."""

import contextlib
import functools
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from skipinit_jax.errors import UsageError
from skipinit_jax.models.depth import Stacked
from skipinit_jax.training.config import TrainConfig

# More blocks or layers have no ResNet, and take long to look at.
_MOST = 200
_CGROUP_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")


@functools.lru_cache(maxsize=16)
def num_parameters(model: nn.Module, image_shape: tuple[int, ...]) -> int:
  """Returns how many parameters a network has, in a time that no size changes.

  Args:
    image_shape: height, width and channels.
  """
  if not getattr(model, "scan", True):
    return num_parameters(model.clone(scan=True), image_shape)
  # It grows linearly with both. Blocks and layers would be looked at one by one.
  for name, first, step in (("layers_per_block", 1, 1), ("depth", 12, 6)):
    size = getattr(model, name, 0)
    first += size % step
    if isinstance(model, Stacked) and size > _MOST:
      sizes: list[dict[str, Any]] = [{name: first}, {name: first + step}]
      small, larger = (
        num_parameters(model.clone(**each), image_shape) for each in sizes
      )
      return small + (size - first) // step * (larger - small)
  init = functools.partial(model.init, train=False)
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  shapes = jax.eval_shape(init, jax.random.key(0), images)["params"]
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def check_size(
  config: TrainConfig,
  model: nn.Module,
  image_shape: tuple[int, ...],
  total_steps: int,
  mesh: Mesh,
) -> None:
  """Checks that a device can hold the parameters, and the images of a step.

  Args:
    image_shape: height, width and channels.
    total_steps: of the run.

  Raises:
    UsageError: it cannot, or the steps cannot be counted. What fits here may still be
      too large to train.
  """
  if total_steps >= 2**31:
    raise UsageError(
      f"epochs is {config.epochs}, which are {total_steps:,} steps: they must be below "
      "2^31."
    )
  # Each parameter has a gradient, and a velocity where there is momentum. Two moments
  # are those of the other optimizers.
  copies = 2 + (config.momentum > 0 if config.optimizer == "sgd" else 2)
  shards = mesh.size if config.shard_params else 1
  size = copies * jnp.dtype(config.param_dtype).itemsize / shards
  device = mesh.local_devices[0]
  check_network(model, image_shape, size, device)
  rows = config.batch_size // (config.accumulation_steps * mesh.size)
  height, width, channels = image_shape
  padded = (height + 2 * config.crop_padding, width + 2 * config.crop_padding, channels)
  what = f"A step has {rows:,} uint8 images of shape {padded}"
  _check_fits(rows * math.prod(padded), what, "image or batch", device)


def check_network(
  model: nn.Module,
  image_shape: tuple[int, ...],
  bytes_per_parameter: float,
  device: jax.Device | None = None,
) -> None:
  """Checks that a device can hold a network's parameters.

  Args:
    image_shape: height, width and channels.
    device: the first one where it is None.

  Raises:
    UsageError: it cannot.
  """
  count = num_parameters(model, image_shape)
  what = f"The network has {count:,} parameters"
  _check_fits(count * bytes_per_parameter, what, "depth or width", device)


def _check_fits(
  needed: float, what: str, remedy: str, device: jax.Device | None
) -> None:
  memory = _memory(device or jax.local_devices()[0])
  if needed > memory:
    raise UsageError(
      f"{what}, which take at least {needed / 2**30:,.1f} GiB, and a device here has "
      f"{memory / 2**30:,.1f} GiB of memory: use a smaller {remedy}."
    )


def _memory(device: jax.Device) -> float:
  """Returns the memory of a device in bytes, infinity if it cannot be known."""
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return float(stats["bytes_limit"])
  sizes = [math.inf]
  if device.platform == "cpu":
    with contextlib.suppress(AttributeError, ValueError, OSError):
      sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    # That of a container; the word "max" where it has none.
    with contextlib.suppress(ValueError, OSError):
      sizes.append(int(_CGROUP_LIMIT.read_text()))
  return min(sizes)
