"""Networks by name, and methods by name in networks."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from skipinit_jax import methods, models
from skipinit_jax.analysis import theory
from skipinit_jax.errors import UsageError
from skipinit_jax.models import registry
from skipinit_jax.training import TrainConfig


class Own(nn.Module):
  """A network of a user, with a width and nothing else that a configuration has."""

  num_classes: int
  width: int = 4

  @nn.compact
  def __call__(self, images, train):
    x = nn.relu(nn.Dense(self.width)(images.reshape(len(images), -1)))
    return nn.Dense(self.num_classes)(x)


@pytest.fixture
def register(monkeypatch):
  """Forgets after the test what it registers."""
  monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
  return models.register


def test_a_registered_network_is_made_of_the_fields_that_it_takes(register):
  before = models.known_names()
  register("own", Own, title="Mine")
  assert models.known_names() == (*before, "own")
  config = TrainConfig(model="own", width=8)
  config.validate()
  assert config.make_model(5) == Own(5, width=8)
  assert config.network_title == "Mine-8"
  with pytest.raises(
    UsageError, match=r"depth is 40: it is for model .*, not for 'own'"
  ):
    TrainConfig(model="own", depth=40).validate()
  with pytest.raises(UsageError, match="did you mean 'own'"):
    TrainConfig(model="owm").validate()


def test_a_factory_gets_the_method(register):
  register("deep", lambda num_classes, method: (num_classes, method))
  with pytest.raises(UsageError, match="'deep' is a tuple: its factory must return a"):
    TrainConfig(model="deep").make_model(5)
  register("mlp", lambda num_classes, method: models.ResidualMLP(2, 3, 5, method))
  model = TrainConfig(model="mlp", method="fixup", alpha=0.5).make_model(5)
  assert model.method.alpha == 0.5


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("resnet", Own), "name is 'resnet', which is that of another model"),
    (("a/b", Own), "name of a model is 'a/b'"),
    (("own", "Own"), "'own' is 'Own': it must be a class or a function with a param"),
    (("own", nn.Dense), "must be a class or a function with a parameter num_classes"),
  ],
)
def test_what_cannot_be_registered(register, arguments, message):
  with pytest.raises(UsageError, match=message):
    register(*arguments)


def test_a_name_stands_for_its_method():
  for make in (
    lambda method: models.WideResNet(10, 1, 5, method),
    lambda method: models.ResNet(18, 5, method),
    lambda method: models.ResidualMLP(2, 4, 5, method),
    lambda method: models.VisionTransformer(2, 4, 5, method),
    methods.linear,
    lambda method: methods.with_ghost_batches(method, 8).name,
  ):
    assert make("batch_norm") == make(methods.get("batch_norm"))
    with pytest.raises(UsageError, match="did you mean 'batch_norm'"):
      make("batchnorm")
  with pytest.raises(UsageError, match="Unknown method 5"):
    models.ResNet(18, 5, 5)
  named, given = (
    theory.predict(theory.uniform(each, 3), theory.Kernel.uniform(1.0, 0.0), 8)
    for each in ("batch_norm", methods.get("batch_norm"))
  )
  jax.tree.map(np.testing.assert_array_equal, named, given)
