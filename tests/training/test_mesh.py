import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from skipinit_jax.training import mesh as mesh_lib


def test_all_devices_by_default():
  mesh = mesh_lib.make_mesh()
  assert mesh.size == jax.device_count() == 8
  assert {*mesh.devices.flat} == {*jax.devices()}
  assert mesh.axis_names == ("data",)
  assert mesh.axis_types == (AxisType.Auto,)


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(2, 6)])
def test_chosen_devices(chosen):
  mesh = mesh_lib.make_mesh(jax.devices()[chosen])
  assert {*mesh.devices.flat} == {*jax.devices()[chosen]}


def test_replicated_is_whole_everywhere():
  mesh = mesh_lib.make_mesh(jax.devices()[:4])
  array = jax.device_put(jnp.arange(6), mesh_lib.replicated(mesh))
  assert len(array.addressable_shards) == 4
  for shard in array.addressable_shards:
    np.testing.assert_array_equal(shard.data, np.arange(6))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_batch_is_cut_along_its_axis(axis):
  mesh = mesh_lib.make_mesh(jax.devices()[:4])
  whole = np.arange(8**3).reshape(8, 8, 8)
  array = jax.device_put(whole, mesh_lib.batch_sharding(mesh, axis))
  parts = np.split(whole, 4, axis)
  for device, part in zip(mesh.devices.flat, parts, strict=True):
    (shard,) = [s for s in array.addressable_shards if s.device == device]
    np.testing.assert_array_equal(shard.data, part)
