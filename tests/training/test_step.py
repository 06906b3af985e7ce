"""The train step and evaluation, against the same by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skipinit_jax.data import augmentation, in_memory
from skipinit_jax.data.datasets import Split
from skipinit_jax.training import TrainConfig, make_evaluate, make_mesh, state_sharding
from skipinit_jax.training.mesh import batch_sharding
from tests.training.runs import (
  assert_close,
  digits,
  dispatch,
  make_step,
  make_trainer,
  preprocess,
)

BATCH_SIZE = 32
MLP = TrainConfig(
  model="residual_mlp", depth=4, width=16, batch_size=BATCH_SIZE, learning_rate=0.05
)


def first_batch():
  train = digits().train
  return preprocess(train.images[:BATCH_SIZE]), train.labels[:BATCH_SIZE]


def test_one_step_by_hand():
  config = dataclasses.replace(MLP, method="skipinit_biases", l2=0.01)
  step, before, _ = make_step(config)
  inputs, labels = first_batch()
  model = config.make_model(10)

  def loss_of(params):
    logits = model.apply({"params": params}, inputs, train=True)
    return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(BATCH_SIZE), labels]), logits

  gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
  (loss, logits), grads = gradient(before.params)
  after = jax.jit(step)(before, inputs, labels)
  assert int(after.step) == 1
  assert after.sums.steps == 1
  np.testing.assert_allclose(after.sums.loss, loss, rtol=1e-5)
  assert float(after.sums.accuracy) == np.mean(np.argmax(logits, -1) == labels)
  norm = math.sqrt(sum(float(np.sum(g**2)) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(after.sums.grad_norm, norm, rtol=1e-5)
  # The first step of momentum is plain gradient descent.
  expected = jax.tree.map(lambda p, g: p - 0.05 * (g + 0.01 * p), before.params, grads)
  assert_close(after.params, expected, atol=1e-6)


def test_running_statistics_by_hand():
  step, before, _ = make_step(
    dataclasses.replace(
      MLP, method="batch_norm", ghost_batch_size=8, accumulation_steps=2
    )
  )
  inputs, labels = first_batch()
  # What the first normalizer of the network sees.
  features = inputs.reshape(BATCH_SIZE, -1) @ before.params["stem"]["kernel"]
  parts = np.asarray(features).reshape(2, 2, 8, 16)
  mean, var = np.zeros(16), np.ones(16)
  # Each part follows the one before, with the mean of its ghost batches.
  for part in parts:
    mean = 0.9 * mean + 0.1 * part.mean(1).mean(0)
    var = 0.9 * var + 0.1 * part.var(1).mean(0)
  after = jax.jit(step)(before, inputs, labels)
  first = jax.tree.map(
    lambda leaf: leaf[0], after.model_state["batch_stats"]["stack"]["blocks"]["norm1"]
  )
  np.testing.assert_allclose(first["mean"], mean, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(first["var"], var, rtol=1e-4)


def test_dropout_has_a_mask_of_its_own_at_each_step_and_in_each_part():
  config = dataclasses.replace(
    MLP, method="skipinit_one", learning_rate=0.0, dropout_rate=0.5
  )
  inputs, labels = first_batch()
  # Two parts of the same examples, in two steps that change no parameter.
  inputs, labels = np.tile(inputs[:16], (2, 1, 1, 1)), np.tile(labels[:16], 2)
  losses = []
  for parts in (1, 2):
    step, state, _ = make_step(dataclasses.replace(config, accumulation_steps=parts))
    step = jax.jit(step)
    first = step(state, inputs, labels)
    second = step(first, inputs, labels)
    losses += [float(first.sums.loss), float(second.sums.loss - first.sums.loss)]
  assert len({round(loss, 4) for loss in losses}) == 4


def test_label_smoothing_and_mixup_by_hand():
  config = dataclasses.replace(
    MLP, method="skipinit_one", label_smoothing=0.2, mixup=0.5, learning_rate=0.0
  )
  inputs, labels = first_batch()
  sums = []
  for parts in (1, 2):
    step, state, _ = make_step(dataclasses.replace(config, accumulation_steps=parts))
    sums.append(jax.jit(step)(state, inputs, labels).sums)
  # All parts of a batch are mixed at once.
  assert_close(sums[1], sums[0])
  key = jax.random.fold_in(state.random_keys().dropout, 0)
  key = jax.random.fold_in(key, 2**31 - 1)
  mixed, others, weight = augmentation.mixup(key, inputs, 0.5)
  logits = config.make_model(10).apply({"params": state.params}, mixed, train=True)
  # One distribution for each example: 0.8 on two labels, and 0.2 on all classes.
  targets = np.full((BATCH_SIZE, 10), 0.02)
  targets[np.arange(BATCH_SIZE), labels] += 0.8 * weight
  targets[np.arange(BATCH_SIZE), labels[others]] += 0.8 * (1 - weight)
  loss = -np.mean(np.sum(targets * np.asarray(jax.nn.log_softmax(logits)), -1))
  np.testing.assert_allclose(sums[0].loss, loss, rtol=1e-5)
  right = np.argmax(logits, -1)[:, None] == np.stack([labels, labels[others]], -1)
  accuracy = right.mean(0) @ np.array([weight, 1 - weight])
  np.testing.assert_allclose(sums[0].accuracy, accuracy, rtol=1e-5)


def test_average_of_parameters_by_hand():
  config = dataclasses.replace(MLP, ema_decay=0.9)
  trainer = make_trainer(config)
  states = [dispatch(trainer, *[1] * steps) for steps in range(4)]
  expected = states[0].params
  for state in states[1:]:
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, expected, state.params)
    average = state.averaged()
    assert_close(average.params, expected, atol=1e-6)
  metrics = trainer.evaluate(state)
  of_average = trainer.evaluate(average)
  for name in ("loss", "accuracy", "top5_accuracy"):
    assert metrics[f"ema_{name}"] == of_average[name]
  assert metrics["ema_loss"] != metrics["loss"]
  assert make_step(MLP, shapes=True)[1].averaged() is None
  half = make_step(dataclasses.replace(config, param_dtype="bfloat16"), shapes=True)[1]
  assert half.params["stem"]["kernel"].dtype == jnp.bfloat16
  assert half.averaged().params["stem"]["kernel"].dtype == jnp.float32


@pytest.fixture(scope="module")
def trained():
  """A network and its state after some steps, on the host."""
  config = dataclasses.replace(MLP, method="batch_norm")
  return config.make_model(10), jax.device_get(dispatch(make_trainer(config), 3))


@pytest.mark.parametrize(("num_devices", "batch_size"), [(1, 16), (1, 1), (8, 64)])
def test_evaluation_by_hand(trained, num_devices, batch_size):
  model, state = trained
  mesh = make_mesh(jax.devices()[:num_devices])
  test = digits().test
  split = Split(test.images[:37], test.labels[:37])
  sharding = state_sharding(state, mesh, shard_params=False)
  evaluate = make_evaluate(
    model,
    lambda images: (images / 255 - digits().mean) / digits().std,
    mesh=mesh,
    sharding=sharding,
  )
  batches = in_memory.eval_batches(split, batch_size, batch_sharding(mesh, 1))
  actual = evaluate(jax.device_put(state, sharding), batches)

  variables = {"params": state.params, **state.model_state}
  inputs = preprocess(split.images)
  logits = np.asarray(model.apply(variables, inputs, train=False), np.float64)
  log_sums = np.log(np.exp(logits).sum(-1))
  loss = np.mean(log_sums - logits[np.arange(37), split.labels])
  correct = int((logits.argmax(-1) == split.labels).sum())
  five = np.argsort(logits, axis=-1)[:, -5:]
  in_top5 = int((five == split.labels[:, None]).any(-1).sum())
  assert 0 < correct < in_top5 < 37
  assert [int(actual.examples), int(actual.correct), int(actual.top5_correct)] == [
    37,
    correct,
    in_top5,
  ]
  assert actual.means() == {
    "loss": pytest.approx(loss, rel=1e-5),
    "accuracy": correct / 37,
    "top5_accuracy": in_top5 / 37,
  }
  # The batch's own statistics would give another loss.
  own, _ = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
  other = optax.softmax_cross_entropy_with_integer_labels(own, split.labels).mean()
  assert abs(float(other) - loss) > 1e-2


def test_gradients_of_bfloat16_parameters_are_added_up_in_float32():
  config = dataclasses.replace(
    MLP, method="skipinit", param_dtype="bfloat16", accumulation_steps=8
  )
  step, state, _ = make_step(config)
  jaxpr = jax.make_jaxpr(step)(state, *first_batch())
  (scan,) = [
    equation
    for equation in jaxpr.jaxpr.eqns
    if equation.primitive.name == "scan" and equation.params["length"] == 8
  ]
  sums = [variable.aval.dtype for variable in scan.outvars]
  assert len(sums) > len(jax.tree.leaves(state.params))
  assert jnp.bfloat16 not in sums
