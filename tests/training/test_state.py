import jax
import numpy as np
import pytest

from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.mesh import make_mesh, replicated
from skipinit_jax.training.optimizer import make_optimizer
from skipinit_jax.training.state import make_init
from tests.training.runs import bits


def init(seed, num_devices=1):
  config = TrainConfig(
    model="residual_mlp", depth=3, width=16, method="batch_norm", seed=seed
  )
  mesh = make_mesh(jax.devices()[:num_devices])
  return make_init(
    config.make_model(10), make_optimizer(config, 5), (8, 8, 1), mesh=mesh
  )(np.uint32(config.seed))


def test_is_the_seeds_on_any_number_of_devices():
  state = init(0)
  assert bits(state) == bits(init(0)) == bits(init(0, num_devices=8))
  other = init(1)
  assert bits(state.params["stem"]) != bits(other.params["stem"])
  assert bits(state.key_data) != bits(other.key_data)


def test_starts_from_nothing():
  state = init(2**32 - 1, num_devices=2)
  assert int(state.step) == 0
  assert jax.tree.leaves(state.sums) == [0, 0, 0, 0]
  assert set(state.model_state) == {"batch_stats"}
  for leaf in jax.tree.leaves(state):
    assert leaf.sharding.is_equivalent_to(
      replicated(make_mesh(jax.devices()[:2])), leaf.ndim
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_keys_are_independent(seed):
  state = init(seed)
  keys = [jax.random.key_data(key).tobytes() for key in state.random_keys()]
  # Nothing is drawn from the key that they are made of, either.
  assert len({*keys, state.key_data.tobytes()}) == 4
