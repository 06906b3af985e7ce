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

# Running statistics, dropout, and images smaller than kernels.
TRAINING = {"depth": 10, "epochs": 1, "method": "batch_norm", "dropout_rate": 0.1}


@pytest.fixture(scope="module")
def exported(run_program, tmp_path_factory):
  """A workdir and what was exported from it."""
  folder = tmp_path_factory.mktemp("export")
  flags = [f"--config.{name}={value}" for name, value in TRAINING.items()]
  workdir, output = folder / "run", folder / "a" / "b"
  run_program(["experiments.train", f"--workdir={workdir}", *flags], status=0)
  done = run_program(
    ["experiments.export", f"--workdir={workdir}", f"--output={output}"], status=0
  )
  return workdir, output, done


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
  assert done.stdout == (
    "Exported step 23: uint8 images [batch, 8, 8, 1] to logits [batch, 10], on cpu, "
    f"cuda, tpu.\nFiles: {output}/model.stablehlo, model.safetensors and "
    "export.json.\n"
  )
  assert {path.name for path in output.iterdir()} == {
    "model.stablehlo",
    "model.safetensors",
    "export.json",
  }
  description = read_json(output / "export.json")
  result = read_json(workdir / "result.json")
  digits = data.load("digits")
  assert description["step"] == result["step"]
  assert description["num_parameters"] == result["num_parameters"]
  assert description["num_classes"] == 10
  assert description["input"] == {"shape": ["batch", 8, 8, 1], "dtype": "uint8"}
  assert description["output"] == {"shape": ["batch", 10], "dtype": "float32"}
  assert description["mean"] == pytest.approx(digits.mean)
  assert description["std"] == pytest.approx(digits.std)
  assert description["platforms"] == ["cpu", "cuda", "tpu"]
  assert description["config"].items() <= result["config"].items()
  assert description["versions"]["jax"] == jax.__version__
  with safetensors.safe_open(output / "model.safetensors", "np") as file:
    assert json.loads(file.metadata()["config"]) == description["config"]
    assert file.metadata()["step"] == "23"


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
model = models.WideResNet(10, 1, 10, methods.get("batch_norm"))
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

  def refused(workdir, output):
    done = run_program(
      ["experiments.export", f"--workdir={workdir}", f"--output={output}"], status=1
    )
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr

  assert refused(output, tmp_path / "new").startswith(
    f"error: There is no checkpoint in {output}/checkpoints: that is not a run's work"
  )
  assert not (tmp_path / "new").exists()
  file = tmp_path / "file"
  file.write_text("kept")
  assert refused(workdir, file) == (
    f"error: The export cannot be written to {file} (File exists): use another "
    "--output.\n"
  )
  assert file.read_text() == "kept"
