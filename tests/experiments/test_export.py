"""A run, exported, and used without what made it."""

import json
import os
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors

from skipinit_jax import data, export
from skipinit_jax.files import as_type, read_json, to_json
from skipinit_jax.training import TrainConfig, load_trained


@pytest.fixture(scope="module")
def exported(run_program, trained_run, tmp_path_factory):
  """The folder of an exported run and what the program printed."""
  output = tmp_path_factory.mktemp("export") / "a" / "b"
  done = run_program(
    ["experiments.export", f"--workdir={trained_run}", f"--output={output}"], status=0
  )
  return output, done.stdout


@pytest.fixture(scope="module")
def expected(trained_run):
  """The test images and the logits that the trained network has for them."""
  digits = data.load("digits")
  trained = load_trained(trained_run)
  images = digits.test.images.astype(np.float32) / 255
  logits = jax.jit(trained.model.apply, static_argnames="train")(
    trained.variables, (images - digits.mean) / digits.std, train=False
  )
  accuracy = np.mean(np.argmax(logits, -1) == digits.test.labels)
  result = read_json(trained_run / "result.json")
  assert accuracy == pytest.approx(result["test_accuracy"], abs=1e-6)
  return digits.test.images, np.asarray(logits)


def test_says_what_it_wrote(trained_run, exported):
  output, printed = exported
  assert "Exported step 4: uint8 images [batch, 8, 8, 1] to logits" in printed
  description = read_json(output / "export.json")
  result = read_json(trained_run / "result.json")
  for name in ("step", "num_parameters"):
    assert description[name] == result[name]
  assert description["input"] == {"shape": ["batch", 8, 8, 1], "dtype": "uint8"}
  assert description["output"] == {"shape": ["batch", 10], "dtype": "float32"}
  config = as_type(TrainConfig, result["config"])
  assert description["config"] == to_json(config.identity())
  with safetensors.safe_open(output / "model.safetensors", "np") as file:
    assert json.loads(file.metadata()["config"]) == description["config"]


def test_program_runs_without_the_package(exported, expected, tmp_path):
  output, _ = exported
  images, logits = expected
  program = f"""
import sys
for name in ("skipinit_jax", "experiments", "flax", "optax", "orbax"):
  sys.modules[name] = None
import pathlib
import jax
import numpy as np
content = pathlib.Path({str(output)!r}, "model.stablehlo").read_bytes()
call = jax.export.deserialize(content).call
images = np.load("images.npy")
np.save("logits.npy", np.concatenate([call(images[:1]), call(images[1:])]))
"""
  np.save(tmp_path / "images.npy", images)
  subprocess.run(
    # Isolated, and elsewhere: the checkout is not on the path.
    [sys.executable, "-I", "-c", program],
    cwd=tmp_path,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=True,
  )
  actual = np.load(tmp_path / "logits.npy")
  np.testing.assert_allclose(actual, logits, rtol=1e-4, atol=1e-4)


def test_folder_is_the_network_and_its_card(trained_run, exported, expected):
  output, _ = exported
  images, logits = expected
  model, variables = export.load(output)
  config = read_json(output / "config.json")
  inputs = (images.astype(np.float32) / 255 - config["mean"]) / config["std"]
  actual = jax.jit(model.apply, static_argnames="train")(variables, inputs, train=False)
  np.testing.assert_allclose(actual, logits, rtol=1e-4, atol=1e-4)

  _, head, text = (output / "README.md").read_text().split("---\n", 2)
  result = read_json(trained_run / "result.json")
  fields = dict(line.split(": ", 1) for line in head.splitlines())
  (index,) = json.loads(fields["model-index"])
  (found,) = index["results"]
  assert found["metrics"] == [{"type": "accuracy", "value": result["test_accuracy"]}]
  assert f"{100 * result['test_accuracy']:.2f} %" in text
  made = result["environment"]
  workdir = f"--workdir={trained_run}"
  made["command"] = made["command"].replace(shlex.quote(workdir), "--workdir=WORKDIR")
  for value in (*made.values(), jax.__version__, "digits"):
    assert value in text.replace("\\", "")
  assert str(trained_run) not in text
