"""The device mesh and how arrays lie on it."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"
"""The mesh's one axis, over which batches are sharded."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh of one axis, `data`.

  Args:
    devices: the devices; None: all.
  """
  devices = jax.devices() if devices is None else devices
  # Convolutions whose gradient swaps batch and features need automatic axes.
  return jax.make_mesh(
    (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """Returns the sharding of arrays whose axis `axis` is the batch."""
  return NamedSharding(mesh, PartitionSpec(*(None,) * axis, DATA_AXIS))
