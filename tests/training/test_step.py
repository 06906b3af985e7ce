import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from skipinit_jax.data import augmentation, in_memory
from skipinit_jax.data.datasets import Split
from skipinit_jax.training import state as state_lib
from skipinit_jax.training import step as step_lib
from skipinit_jax.training.config import TrainConfig
from skipinit_jax.training.mesh import batch_sharding, make_mesh, replicated
from skipinit_jax.training.optimizer import make_optimizer
from tests.training import runs
from tests.training.runs import (
  assert_close,
  assert_same_training,
  bits,
  digits,
  preprocess,
)

# Three batches of 32 an epoch, and four examples that each epoch leaves out.
NUM_EXAMPLES, BATCH_SIZE, STEPS_PER_EPOCH = 100, 32, 3

MLP = TrainConfig(
  model="residual_mlp",
  depth=4,
  width=16,
  batch_size=BATCH_SIZE,
  learning_rate=0.05,
  schedule="exponential",
  growth_per_epoch=0.8,
)
WRN = dataclasses.replace(MLP, model="wide_resnet", depth=10, width=1)


def augment(key, images):
  crop_key, flip_key = jax.random.split(key)
  images = augmentation.pad_and_crop(crop_key, images, 1)
  return preprocess(augmentation.random_flip(flip_key, images))


@functools.cache
def train_split():
  train = digits().train
  return Split(train.images[:NUM_EXAMPLES], train.labels[:NUM_EXAMPLES])


_initial = {}


def initial_state(config):
  """Returns the state that a configuration starts with, on the host."""
  # Batches and their parts have no part in it.
  key = repr(dataclasses.replace(config, ghost_batch_size=None, accumulation_steps=1))
  if key not in _initial:
    state = state_lib.make_init(
      config.make_model(10),
      make_optimizer(config, STEPS_PER_EPOCH),
      (8, 8, 1),
      mesh=make_mesh(jax.devices()[:1]),
    )(np.uint32(config.seed))
    _initial[key] = jax.device_get(state)
  return _initial[key]


class Trainer(runs.Trainer):
  """It keeps a state, which begins as the same on any number of devices."""

  def __init__(self, config, num_devices=1, **arguments):
    super().__init__(config, num_devices, num_examples=NUM_EXAMPLES, **arguments)
    self.start = initial_state(config)
    self.reset()

  def reset(self):
    """Goes back to the start."""
    self.state = jax.device_put(self.start, replicated(self.mesh))

  def run(self, *dispatches):
    """Returns the state after dispatches of so many steps each, from the start."""
    self.reset()
    self.state = self.dispatch(self.state, *dispatches)
    return jax.device_get(self.state)


def largest_change(after, before):
  changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), after, before)
  return max(jax.tree.leaves(changes))


@pytest.mark.parametrize(
  ("config", "arguments"),
  [
    (dataclasses.replace(WRN, method="batch_norm"), {}),
    # Two ghost batches on each of two devices, half a one on each of eight.
    (dataclasses.replace(WRN, method="batch_norm", ghost_batch_size=8), {}),
    (
      dataclasses.replace(MLP, method="skipinit", dropout_rate=0.3),
      {"augment": augment},
    ),
    (dataclasses.replace(WRN, method="skipinit", accumulation_steps=2), {}),
  ],
  ids=["batch_norm", "ghost", "skipinit_augmented", "skipinit_accumulated"],
)
def test_any_number_of_devices(config, arguments):
  def run(num_devices):
    return Trainer(config, num_devices, **arguments).run(3, 2)

  one = run(1)
  # What follows would hold for a step that does nothing.
  assert largest_change(one.params, initial_state(config).params) > 1e-2
  assert int(one.step) == 5
  assert one.sums.steps == 2
  for num_devices in (2, 8):
    many = run(num_devices)
    assert_same_training(many, one)


def test_one_step_by_hand():
  trainer = Trainer(dataclasses.replace(MLP, method="skipinit_biases", l2=0.01))
  before = trainer.start
  images, labels = train_split().images[:BATCH_SIZE], train_split().labels[:BATCH_SIZE]
  inputs = np.asarray(preprocess(images))

  def loss_of(params):
    logits = trainer.model.apply({"params": params}, inputs, train=True)
    return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(BATCH_SIZE), labels]), logits

  gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
  (loss, logits), grads = gradient(before.params)
  after = jax.jit(trainer.step)(trainer.state, inputs, labels)
  assert int(after.step) == 1
  assert after.sums.steps == 1
  np.testing.assert_allclose(after.sums.loss, loss, rtol=1e-5)
  assert float(after.sums.accuracy) == np.mean(np.argmax(logits, -1) == labels)
  norm = math.sqrt(sum(float(np.sum(g**2)) for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(after.sums.grad_norm, norm, rtol=1e-5)
  # The first step of momentum is plain gradient descent.
  expected = jax.tree.map(lambda p, g: p - 0.05 * (g + 0.01 * p), before.params, grads)
  assert_close(after.params, expected, atol=1e-6)


@pytest.mark.parametrize(
  ("whole", "all_parts"),
  [
    ({"method": "skipinit"}, [{"method": "skipinit"}]),
    (
      {"method": "batch_norm", "ghost_batch_size": 8},
      # Normalization sees one part of 8 at a time: a part is a ghost batch.
      [{"method": "batch_norm", "ghost_batch_size": 8}, {"method": "batch_norm"}],
    ),
  ],
  ids=["skipinit", "ghost"],
)
def test_accumulation_is_the_whole_batch(whole, all_parts):
  expected = Trainer(dataclasses.replace(MLP, **whole)).run(3, 1)
  for parts in all_parts:
    config = dataclasses.replace(MLP, **parts, accumulation_steps=4)
    actual = Trainer(config, num_devices=2).run(3, 1)
    assert_close(actual.params, expected.params)
    assert_close(actual.sums, expected.sums)
    assert_close(actual.opt_state, expected.opt_state, atol=1e-4)


@pytest.mark.parametrize("accumulation_steps", [1, 4])
def test_running_statistics_by_hand(accumulation_steps):
  trainer = Trainer(
    dataclasses.replace(
      MLP,
      method="batch_norm",
      ghost_batch_size=8,
      accumulation_steps=accumulation_steps,
    )
  )
  inputs = np.asarray(preprocess(train_split().images[:BATCH_SIZE]))
  # What the first normalizer of the network sees.
  features = inputs.reshape(BATCH_SIZE, -1) @ trainer.state.params["stem"]["kernel"]
  ghosts = np.asarray(features).reshape(4, 8, 16)
  mean, var = np.zeros(16), np.ones(16)
  if accumulation_steps == 1:
    mean = 0.9 * mean + 0.1 * ghosts.mean(1).mean(0)
    var = 0.9 * var + 0.1 * ghosts.var(1).mean(0)
  else:
    # Each part follows the one before.
    for ghost in ghosts:
      mean = 0.9 * mean + 0.1 * ghost.mean(0)
      var = 0.9 * var + 0.1 * ghost.var(0)
  labels = train_split().labels[:BATCH_SIZE]
  after = jax.jit(trainer.step)(trainer.state, inputs, labels)
  first = jax.tree.map(
    lambda leaf: leaf[0], after.model_state["batch_stats"]["stack"]["blocks"]["norm1"]
  )
  np.testing.assert_allclose(first["mean"], mean, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(first["var"], var, rtol=1e-4)


def test_cut_into_any_dispatches():
  config = dataclasses.replace(MLP, method="batch_norm", dropout_rate=0.3)
  traces = []

  def traced_augment(key, images):
    traces.append(key)
    return augment(key, images)

  trainer = Trainer(config, augment=traced_augment)
  whole = trainer.run(3, 3, 2)
  traced = len(traces)
  assert bits(trainer.run(1, 1, 1, 2, 1, 1, 1)) == bits(whole)
  # One program takes any number of steps.
  assert len(traces) == traced


@functools.cache
def recorder(num_devices=1):
  """Returns functions: a new state, and dispatches of a step that records.

  The step notes what it is given, and adds a value of the state, that of its field
  `opt_state`, to a sum or a parameter when it is the fifth.
  """
  mesh = make_mesh(jax.devices()[:num_devices])
  numbers = np.arange(NUM_EXAMPLES)
  split = in_memory.put(
    Split(
      numbers.astype(np.uint8).reshape(-1, 1, 1, 1), 1000 + numbers.astype(np.int32)
    ),
    replicated(mesh),
  )

  def new_state(**fifth):
    return state_lib.TrainState(
      step=jnp.int32(0),
      params={"weight": jnp.zeros(())},
      model_state={
        "images": jnp.full((9, BATCH_SIZE), -1),
        "labels": jnp.full((9, BATCH_SIZE), -1),
        "augment_keys": jnp.zeros((9, 2), jnp.uint32),
      },
      opt_state={
        what: jnp.float32(fifth.get(what, 0))
        for what in ("loss", "grad_norm", "weight")
      },
      key_data=jax.random.key_data(jax.random.key(7)),
      sums=state_lib.Sums.zero(),
    )

  def augment(key, images):
    data = jax.random.key_data(key)
    return types.SimpleNamespace(images=images, key=data)

  def step(state, inputs, labels):
    record = state.model_state
    images = inputs.images.reshape(-1).astype(jnp.int32)
    record = {
      "images": record["images"].at[state.step].set(images),
      "labels": record["labels"].at[state.step].set(labels),
      "augment_keys": record["augment_keys"].at[state.step].set(inputs.key),
    }
    fifth = jax.tree.map(lambda x: jnp.where(state.step == 4, x, 0), state.opt_state)
    sums = state.sums
    return state.replace(
      step=state.step + 1,
      params={"weight": fifth["weight"]},
      model_state=record,
      sums=sums.replace(
        steps=sums.steps + 1,
        # The loss of step n is 10^n.
        loss=sums.loss + 10.0**state.step + fifth["loss"],
        grad_norm=sums.grad_norm + fifth["grad_norm"],
      ),
    )

  train_steps = step_lib.make_train_steps(
    step, augment, num_examples=NUM_EXAMPLES, batch_size=BATCH_SIZE, mesh=mesh
  )
  return new_state, lambda state, num_steps: train_steps(state, split, num_steps)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_every_example_once_an_epoch(num_devices):
  new_state, train_steps = recorder(num_devices)
  state = new_state()
  for num_steps in (3, 1, 2, 1, 1, 1):
    state, finite = train_steps(state, num_steps)
    assert finite
  images = np.asarray(state.model_state["images"])
  np.testing.assert_array_equal(state.model_state["labels"], images + 1000)
  epochs = images.reshape(3, -1)
  for epoch in epochs:
    assert len({*epoch.tolist()}) == 3 * BATCH_SIZE
    assert {*epoch.tolist()} <= {*range(NUM_EXAMPLES)}
    # Shuffled: in order, all but the last step would be 1.
    assert np.mean(np.diff(epoch) == 1) < 0.1
  # Epochs differ in order, and in the four that they leave out.
  assert len({epoch.tobytes() for epoch in epochs}) == 3
  assert len({frozenset(epoch.tolist()) for epoch in epochs}) == 3
  # Each step augments in its own way.
  keys = np.asarray(state.model_state["augment_keys"])
  assert len({key.tobytes() for key in keys}) == 9


def test_sums_start_again_with_each_epoch():
  new_state, train_steps = recorder()
  state = new_state()
  seen = []
  for num_steps in (1, 2, 1, 1, 1, 3):
    state, _ = train_steps(state, num_steps)
    seen.append((int(state.sums.steps), float(state.sums.loss)))
  # At the end of an epoch they are still there, to be reported.
  assert seen == [
    (1, 1e0),
    (3, 111e0),
    (1, 1e3),
    (2, 11e3),
    (3, 111e3),
    (3, pytest.approx(111e6)),
  ]


@pytest.mark.parametrize(
  ("what", "value"),
  [
    ("loss", math.nan),
    ("loss", math.inf),
    ("weight", math.nan),
    ("weight", -math.inf),
  ],
)
def test_stops_after_the_first_step_that_is_not_finite(what, value):
  new_state, train_steps = recorder()
  state = new_state(**{what: value})
  state, finite = train_steps(state, 3)
  assert finite
  state, finite = train_steps(state, 3)
  assert not finite
  assert int(state.step) == 5
  # The sixth step was not taken, and no later dispatch takes it.
  assert (np.asarray(state.model_state["images"][5]) == -1).all()
  state, finite = train_steps(state, 1)
  assert not finite
  assert int(state.step) == 5


def test_diverging_network_stops_where_it_diverges():
  # Exactly the steps that a plain loop of single steps takes.
  config = dataclasses.replace(
    MLP, method="unnormalized", learning_rate=1.0, growth_per_epoch=1e6
  )
  trainer = Trainer(config)
  step = jax.jit(trainer.step)
  keys, state, losses = trainer.state.random_keys(), trainer.state, []
  while all(map(math.isfinite, losses)):
    epoch, index = divmod(int(state.step), STEPS_PER_EPOCH)
    rows = in_memory.epoch_permutation(keys.order, epoch, NUM_EXAMPLES)
    rows = np.asarray(rows)[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
    before = float(state.sums.loss)
    inputs = preprocess(train_split().images[rows])
    state = step(state, inputs, train_split().labels[rows])
    finite = bool(jnp.isfinite(optax.tree.norm(state.params)))
    losses.append(float(state.sums.loss) - before if finite else math.nan)
    assert len(losses) < 3 * STEPS_PER_EPOCH
  # It is the parameters or the loss of this step, not of the first.
  assert len(losses) > 1
  finite = True
  while finite:
    left = STEPS_PER_EPOCH - int(trainer.state.step) % STEPS_PER_EPOCH
    trainer.state, finite = trainer.train_steps(trainer.state, trainer.split, left)
  assert int(trainer.state.step) == len(losses)


@pytest.fixture(scope="module")
def trained():
  trainer = Trainer(dataclasses.replace(MLP, method="batch_norm"))
  return trainer.model, trainer.run(3)


@pytest.mark.parametrize(
  ("num_devices", "batch_size"), [(1, 37), (1, 16), (1, 1), (8, 16), (8, 64)]
)
def test_evaluation_by_hand(trained, num_devices, batch_size):
  model, state = trained
  mesh = make_mesh(jax.devices()[:num_devices])
  test = digits().test
  split = Split(test.images[:37], test.labels[:37])
  evaluate = step_lib.make_evaluate(model, preprocess, mesh=mesh)
  batches = in_memory.eval_batches(split, batch_size, batch_sharding(mesh, 1))
  actual = evaluate(jax.device_put(state, replicated(mesh)), batches)

  variables = {"params": state.params, **state.model_state}
  inputs = preprocess(split.images)
  logits = np.asarray(model.apply(variables, inputs, train=False), np.float64)
  log_sums = np.log(np.exp(logits).sum(-1))
  loss = np.mean(log_sums - logits[np.arange(37), split.labels])
  assert int(actual.examples) == 37
  np.testing.assert_allclose(actual.loss / 37, loss, rtol=1e-5)
  correct = int((logits.argmax(-1) == split.labels).sum())
  assert 0 < correct < 37
  assert int(actual.correct) == correct
  five = np.argsort(logits, axis=-1)[:, -5:]
  in_top5 = int((five == split.labels[:, None]).any(-1).sum())
  assert correct < in_top5 < 37
  assert int(actual.top5_correct) == in_top5
  # The batch's own statistics would give another loss.
  own, _ = model.apply(variables, inputs, train=True, mutable=["batch_stats"])
  other = optax.softmax_cross_entropy_with_integer_labels(own, split.labels).mean()
  assert abs(float(other) - loss) > 1e-2


def test_a_large_finite_weight_is_finite():
  # Its square is not, in float32.
  new_state, _ = recorder()
  for value, finite in ((1e30, True), (np.inf, False), (np.nan, False)):
    state = new_state().replace(params={"weight": jnp.float32(value)})
    assert bool(step_lib.is_finite(state)) == finite


def test_gradients_of_bfloat16_parameters_are_added_up_in_float32():
  config = dataclasses.replace(
    MLP, method="skipinit", param_dtype="bfloat16", accumulation_steps=8
  )
  trainer = Trainer(config)
  images, labels = train_split().images[:BATCH_SIZE], train_split().labels[:BATCH_SIZE]
  jaxpr = jax.make_jaxpr(trainer.step)(trainer.state, preprocess(images), labels)
  (scan,) = [
    equation
    for equation in jaxpr.jaxpr.eqns
    if equation.primitive.name == "scan" and equation.params["length"] == 8
  ]
  sums = [variable.aval.dtype for variable in scan.outvars]
  assert len(sums) > len(jax.tree.leaves(trainer.state.params))
  assert jnp.bfloat16 not in sums
