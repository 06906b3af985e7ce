"""Training on a data set that is read from its files while it is trained on."""

import dataclasses

import numpy as np
import pytest

from skipinit_jax.data import augmentation, streaming
from skipinit_jax.data.prepare import sample_photos
from skipinit_jax.training import TrainConfig, load_trained
from tests.training.runs import StopAt, bits, rows_of, train


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("data"))
  sample_photos.prepare(folder)
  return folder


@pytest.fixture(scope="module")
def config(data_dir):
  # 250 training examples make 7 steps an epoch.
  return TrainConfig(
    dataset="sample_photos",
    data_dir=data_dir,
    data_workers=0,
    image_size=8,
    model="residual_mlp",
    depth=2,
    width=16,
    batch_size=32,
    epochs=2,
    learning_rate=0.01,
    checkpoint_every_seconds=0,
    signal_every_steps=5,
  )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("streamed")
  return train(config, workdir), workdir


def test_accuracy_by_hand(config, data_dir, finished):
  """Each of the 50 photographs once, with the final parameters."""
  result, workdir = finished
  assert (result.status, result.step) == ("completed", 14)
  assert [row["step"] for row in rows_of(workdir, "signal")] == [0, 5, 10, 14]
  dataset = streaming.load("sample_photos", data_dir=data_dir, image_size=8)
  trained = load_trained(workdir)
  correct = top5_correct = count = 0
  for images, labels, mask in streaming.eval_batches(dataset, batch_size=7):
    inputs = augmentation.normalize(images, dataset.mean, dataset.std)
    logits = np.asarray(trained.model.apply(trained.variables, inputs, train=False))
    ranks = (-logits).argsort(-1).argsort(-1)[np.arange(7), labels]
    correct += int(((ranks == 0) & mask).sum())
    top5_correct += int(((ranks < 5) & mask).sum())
    count += int(mask.sum())
  assert count == 50
  assert result.test_accuracy == pytest.approx(correct / 50, abs=1e-6)
  assert result.test_top5_accuracy == pytest.approx(top5_correct / 50, abs=1e-6)


def test_a_resumed_run_is_the_same_bit_for_bit(config, finished, tmp_path):
  _, whole = finished
  stopped = train(config, tmp_path, stop=StopAt(4))
  assert stopped.status == "interrupted" and 0 < stopped.step < 14
  # How many processes decode may change.
  resumed = train(dataclasses.replace(config, data_workers=1), tmp_path)
  assert resumed.status == "completed"
  assert rows_of(tmp_path) == rows_of(whole)
  assert bits(load_trained(tmp_path).variables) == bits(load_trained(whole).variables)
