"""The network of a run, read back on other devices than the run's."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.files import write_json
from skipinit_jax.models import ResidualMLP
from skipinit_jax.training import (
  Checkpoints,
  TrainConfig,
  load_trained,
)
from skipinit_jax.training.transformations import AveragedParams
from tests.training.runs import bits, make_step

CONFIG = TrainConfig(
  model="residual_mlp",
  depth=2,
  width=6,
  method="batch_norm",
  l2_exempt=("scale", "bias"),
  data_dir="/x",
)


@pytest.fixture(scope="module")
def state():
  """A run's state, on eight devices."""
  return make_step(CONFIG, num_devices=8, image_shape=(2, 2, 1), num_classes=5)[1]


@pytest.fixture
def workdir(state, tmp_path):
  with Checkpoints(tmp_path, config=CONFIG.identity()) as checkpoints:
    checkpoints.save(23, state)
  return tmp_path


def test_gives_the_network_of_the_run(state, workdir):
  trained = load_trained(workdir)
  assert isinstance(trained.model, ResidualMLP)
  # Classes are counted without the data set, which here has another number.
  assert trained.model == CONFIG.make_model(5)
  assert trained.step == 23
  expected = {"params": state.params, **state.model_state}
  assert expected.keys() == {"params", "batch_stats"}
  assert bits(trained.variables) == bits(expected)


def test_gives_the_average_of_a_run(state, workdir, tmp_path):
  with pytest.raises(UsageError, match=r"no average .* ema_decay is None"):
    load_trained(workdir, averaged=True)
  average = jax.tree.map(lambda p: p + 1, state.params)
  averaged = state.replace(opt_state=(*state.opt_state, AveragedParams(average)))
  config = dataclasses.replace(CONFIG, ema_decay=0.9)
  with Checkpoints(tmp_path / "new", config=config.identity()) as checkpoints:
    checkpoints.save(23, averaged)
  for is_averaged, expected in ((True, average), (False, state.params)):
    trained = load_trained(tmp_path / "new", averaged=is_averaged)
    assert bits(trained.variables["params"]) == bits(expected)


def test_on_other_devices(state, workdir):
  program = f"""
import jax, numpy as np
from skipinit_jax.training import load_trained
assert jax.device_count() == 1
print(load_trained({str(workdir)!r}).variables["params"]["stem"]["kernel"].tolist())
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=True,
    capture_output=True,
    text=True,
  )
  kernel = np.float32(json.loads(done.stdout))
  np.testing.assert_array_equal(kernel, state.params["stem"]["kernel"])


def test_configuration(workdir):
  # A run that was killed has no result, and only that says where the data lay.
  assert load_trained(workdir).config == dataclasses.replace(
    CONFIG, l2_exempt=["scale", "bias"], freeze=[], data_dir=None
  )
  write_json(workdir / "result.json", {"config": dataclasses.asdict(CONFIG)})
  assert load_trained(workdir).config.data_dir == "/x"

  write_json(workdir / "result.json", {"config": {"depth": 3, "unknown": 1}})
  with pytest.raises(UsageError, match="is damaged or of another"):
    load_trained(workdir)
