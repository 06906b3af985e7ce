"""The equivalences in float64, against plain optax, and the program's files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import equivalence
from experiments.equivalence import EquivalenceConfig, Run, decay_root
from skipinit_jax import data, methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResidualMLP

SMALL = {"depth": 2, "width": 8, "batch_size": 16, "steps": 20}
REPARAMETERIZATION = EquivalenceConfig(**SMALL, l2=0.05, constants=(4.0, 3.0))
WEIGHT_DECAY = EquivalenceConfig("weight_decay", **SMALL, l2=0.08, learning_rate=2**-5)


def plain_losses(config, method):
  """The losses of a run as one writes it with optax, in float64."""
  dataset = data.load("digits")
  labels = dataset.train.labels
  images = data.augmentation.normalize(
    jnp.asarray(dataset.train.images), dataset.mean, dataset.std
  )
  images = np.asarray(images, "float64")
  rng = np.random.default_rng(config.seed)
  sizes = config.depth, config.width, 10, method
  variables = jax.jit(functools.partial(ResidualMLP(*sizes).init, train=False))(
    jax.random.key(config.seed), jnp.zeros((1, 8, 8, 1))
  )
  losses = []
  with jax.enable_x64(True):
    model = ResidualMLP(*sizes, dtype="float64", param_dtype="float64")
    state = jax.tree.map(lambda leaf: leaf.astype("float64"), variables)
    params = state.pop("params")
    optimizer = optax.chain(
      optax.add_decayed_weights(config.l2),
      optax.sgd(config.learning_rate, config.momentum),
    )
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, state, opt_state, images, labels):
      def loss(params):
        logits, new_state = model.apply(
          {"params": params, **state}, images, train=True, mutable=[*state]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new_state

      (value, state_), grads = jax.value_and_grad(loss, has_aux=True)(params)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), state_, opt_state, value

    for _ in range(config.steps):
      rows = rng.permutation(len(labels))[: config.batch_size]
      params, state, opt_state, value = step(
        params, state, opt_state, images[rows], labels[rows]
      )
      losses.append(float(value))
  return np.array(losses)


def test_divided_parameters_at_a_multiplied_rate_train_alike(tmp_path):
  config = REPARAMETERIZATION
  run = Run(np.full(config.steps, 9 * config.learning_rate), config.l2, c=3.0)
  method = methods.get("skipinit")
  (done,) = equivalence.train(config, method, "float64", {"": run}).values()
  expected = plain_losses(config, method)
  assert expected[-1] < 0.9 * expected[0]
  np.testing.assert_allclose(done.loss, expected, rtol=1e-11)

  largest = largest_differences(config, tmp_path, "rates.png")
  # A power of two is exact.
  assert largest["c = 4, float64"] == largest["c = 4, float32"] == 0
  assert 0 < largest["c = 3, float64"] < 1e-11 < largest["c = 3, float32"]
  assert largest["rate cη, float64"] > 0.1


def test_a_growing_rate_is_weight_decay(tmp_path):
  largest = largest_differences(WEIGHT_DECAY, tmp_path, "functions.png")
  assert largest.pop("float64") < 1e-11
  assert len(largest) == 5
  assert min(largest.values()) > 1e-7


def largest_differences(config, folder, figure):
  equivalence.main(config, str(folder))
  assert (folder / figure).stat().st_size > 0
  return json.loads((folder / "equivalence.json").read_text())["largest_difference"]


@pytest.mark.parametrize(
  ("rate", "momentum", "l2"), [(0.125, 0.9, 0.02), (0.1, 0.5, 1e-3), (2.0, 0.0, 0.1)]
)
def test_decay_root_solves_the_equation(rate, momentum, l2):
  rho = decay_root(rate, momentum, l2)
  roots = np.roots([1, -(1 + momentum - rate * l2), momentum])
  assert rho == pytest.approx(max(roots), rel=1e-12)
  assert 0 < rho < 1


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"experiment": "weight_decy"}, "did you mean 'weight_decay'"),
    ({"learning_rate": float("nan")}, "learning_rate has nan"),
    ({"constants": (3.0, 0.0)}, "constants has 0"),
    ({"width": 2**31 - 1}, "use a smaller depth or width"),
    ({"constants": ()}, "constants is empty"),
    ({"experiment": "weight_decay", "constants": (2.0,)}, "for reparameterization"),
    ({"steps": 50.0}, "steps is 50.0: it must be a whole"),
    ({"batch_size": 2000}, "not between 1 and 1472"),
    ({"experiment": "weight_decay", "l2": 0.5}, "l2 is 0.5: .* only below 0.0421"),
    (SMALL | {"learning_rate": 1e6}, "the original run diverges"),
  ],
)
def test_bad_values(fields, words, tmp_path):
  with pytest.raises(UsageError, match=words):
    equivalence.main(EquivalenceConfig(**fields), str(tmp_path / "workdir"))
  assert not (tmp_path / "workdir").exists()
