"""The device mesh and how arrays lie on it."""

import contextlib
from collections.abc import Sequence
from typing import Any

import chex
import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from skipinit_jax.models.depth import is_stacked

DATA_AXIS = "data"
"""The mesh's one axis, over which batches are sharded."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh of one axis, `data`, over some devices, or over all of them."""
  devices = jax.devices() if devices is None else devices
  # `jax.make_mesh` would order the chips of a TPU slice by their place in it: then no
  # host had consecutive rows of a batch, and ghost batches would depend on the slice.
  ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
  # `with_sharding_constraint`, by which steps place batches and activations, takes only
  # automatic axes.
  return Mesh(np.array(ordered), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Returns the sharding of arrays whose axis `axis` is the batch."""
  return NamedSharding(mesh, PartitionSpec(*(None,) * axis, DATA_AXIS))


def fsdp_sharding(tree: chex.ArrayTree, mesh: Mesh) -> Any:
  """Returns the sharding of parameters, or what goes with them, over all devices.

  Each kernel is cut along its largest axis that the devices divide: fully sharded data
  parallelism, as in ZeRO (Rajbhandari et al., SC 2020). The axis of a scanned stack
  over its blocks stays whole, so that a block's parameters can be gathered when its
  turn comes: if that axis were cut, XLA would gather the parameters of all blocks at
  once. Kernels without an axis to cut stay whole on every device. So do scalars and
  vectors (biases, scales, alphas), whose collectives would cost more than their memory.

  Args:
    tree: parameters, their gradients or an optimizer's state, or the
      `jax.ShapeDtypeStruct`s of one.

  Returns:
    A tree of shardings, of the same structure.
  """

  def sharding(path: tuple[Any, ...], leaf: jax.Array) -> NamedSharding:
    own_axes = range(int(is_stacked(path)), leaf.ndim)
    fitting = [axis for axis in own_axes if leaf.shape[axis] % mesh.size == 0]
    if len(own_axes) < 2 or not fitting:
      return replicated(mesh)
    return batch_sharding(mesh, max(fitting, key=lambda axis: leaf.shape[axis]))

  return jax.tree.map_with_path(sharding, tree)


def sharded_activations(
  mesh: Mesh, batch_size: int, params_sharding: Any
) -> contextlib.AbstractContextManager[None]:
  """Keeps what a network's modules return in this context sharded over the batch.

  Where a layer's parameters are sharded too, XLA may gather either these or the
  activations. In this context it gathers the parameters, just before their use. Where
  they are whole on every device, the context does nothing.

  Args:
    batch_size: number of examples, a multiple of the mesh's devices.
    params_sharding: how the network's parameters lie on the mesh.
  """
  if all(each.is_fully_replicated for each in jax.tree.leaves(params_sharding)):
    return contextlib.nullcontext()

  def constrain(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
    output = run(*args, **kwargs)
    if isinstance(output, jax.Array) and output.shape[:1] == (batch_size,):
      return jax.lax.with_sharding_constraint(output, batch_sharding(mesh))
    return output

  return nn.intercept_methods(constrain)
