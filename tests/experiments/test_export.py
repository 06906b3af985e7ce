"""A run, exported and used by processes that lack what made it."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors

from skipinit_jax import data
from skipinit_jax.files import read_json
from skipinit_jax.training import load_trained


@pytest.fixture(scope="module")
def exported(run_program, trained_run, tmp_path_factory):
  """A workdir and what was exported from it."""
  output = tmp_path_factory.mktemp("export") / "a" / "b"
  done = run_program(
    ["experiments.export", f"--workdir={trained_run}", f"--output={output}"], status=0
  )
  return trained_run, output, done


@pytest.fixture(scope="module")
def expected(exported):
  """The test images and the logits that the trained network has for them."""
  workdir, *_ = exported
  digits = data.load("digits")
  trained = load_trained(workdir)
  images = digits.test.images.astype(np.float32) / 255
  logits = jax.jit(trained.model.apply, static_argnames="train")(
    trained.variables, (images - digits.mean) / digits.std, train=False
  )
  accuracy = np.mean(np.argmax(logits, -1) == digits.test.labels)
  result = read_json(workdir / "result.json")
  assert accuracy == pytest.approx(result["test_accuracy"], abs=1e-6)
  return digits.test.images, np.asarray(logits)


def logits_of(program, folder, images):
  """Runs a program in a process of its own, from images.npy to logits.npy."""
  np.save(folder / "images.npy", images)
  subprocess.run(
    # Isolated, and elsewhere: the checkout is not on the path.
    [sys.executable, "-I", "-c", program],
    cwd=folder,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    check=True,
  )
  return np.load(folder / "logits.npy")


def test_says_what_it_wrote(exported):
  workdir, output, done = exported
  assert "Exported step 4: uint8 images [batch, 8, 8, 1] to logits" in done.stdout
  files = {"model.stablehlo", "model.safetensors", "export.json"}
  assert {path.name for path in output.iterdir()} == files
  assert all(name in done.stdout for name in files)
  description = read_json(output / "export.json")
  result = read_json(workdir / "result.json")
  digits = data.load("digits")
  for name in ("step", "num_parameters"):
    assert description[name] == result[name]
  assert description["input"] == {"shape": ["batch", 8, 8, 1], "dtype": "uint8"}
  assert description["output"] == {"shape": ["batch", 10], "dtype": "float32"}
  assert description["mean"] == pytest.approx(digits.mean)
  assert description["std"] == pytest.approx(digits.std)
  assert description["config"].items() <= result["config"].items()
  assert description["versions"]["jax"] == jax.__version__
  with safetensors.safe_open(output / "model.safetensors", "np") as file:
    assert json.loads(file.metadata()["config"]) == description["config"]
    assert file.metadata()["step"] == "4"


def test_program_runs_without_the_package(exported, expected, tmp_path):
  _, output, _ = exported
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
parts = [call(images[:1]), call(images[1:])]
np.save("logits.npy", np.concatenate(parts))
"""
  actual = logits_of(program, tmp_path, images)
  np.testing.assert_allclose(actual, logits, rtol=1e-4, atol=1e-4)


def test_weights_run_without_training_code(exported, expected, tmp_path):
  _, output, _ = exported
  images, logits = expected
  program = f"""
import sys
sys.modules["skipinit_jax.training"] = sys.modules["orbax"] = None
import json, pathlib
import jax
import numpy as np
from skipinit_jax import data, export, methods, models
folder = pathlib.Path({str(output)!r})
description = json.loads((folder / "export.json").read_text())
model = models.ResidualMLP(2, 8, 10, methods.get("batch_norm"))
variables = export.load_safetensors(folder / "model.safetensors")
images = data.augmentation.normalize(
  np.load("images.npy"), description["mean"], description["std"]
)
apply = jax.jit(model.apply, static_argnames="train")
np.save("logits.npy", apply(variables, images, train=False))
"""
  actual = logits_of(program, tmp_path, images)
  np.testing.assert_allclose(actual, logits, rtol=1e-4, atol=1e-4)


def test_bad_input_is_one_sentence(exported, run_program, tmp_path):
  workdir, output, _ = exported
  file = tmp_path / "file"
  file.write_text("kept")
  for source, target, message in (
    (output, tmp_path / "new", f"error: There is no checkpoint in {output}/checkpoi"),
    (workdir, file, f"error: The export cannot be written to {file} (File exists): "),
  ):
    done = run_program(
      ["experiments.export", f"--workdir={source}", f"--output={target}"], status=1
    )
    assert done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
  assert not (tmp_path / "new").exists()
  assert file.read_text() == "kept"
