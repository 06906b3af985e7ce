"""The train step, many of them in one dispatch, and evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from skipinit_jax.data import in_memory
from skipinit_jax.training.compilation import compiler_options
from skipinit_jax.training.mesh import (
  batch_sharding,
  replicated,
  sharded_activations,
)
from skipinit_jax.training.state import Sums, TrainState

TrainStep = Callable[[TrainState, jax.Array, jax.Array], TrainState]
Augment = Callable[[jax.Array, jax.Array], jax.Array]


class EvalSums(NamedTuple):
  """Sums over examples, of which those of several batches can be added up.

  Attributes:
    examples: their number.
    loss: sum of their cross-entropies.
    correct: number of those whose largest logit is the label's.
    top5_correct: number of those where it is among the five largest.
  """

  examples: jax.Array
  loss: jax.Array
  correct: jax.Array
  top5_correct: jax.Array


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  *,
  mesh: Mesh,
  accumulation_steps: int = 1,
  sharding: TrainState | None = None,
) -> TrainStep:
  """Returns one optimizer step, to be called under `jax.jit`.

  Args:
    model: the network, called as `model(images, train)`.
    optimizer: the optimizer.
    mesh: the mesh whose axis `data` shares the batch.
    accumulation_steps: parts of the batch, in order, whose gradients are added up
      one after the other. Normalization sees one part at a time, and each part's
      running statistics follow those of the part before.
    sharding: how the state lies on the mesh, from `state_sharding`; None: whole on
      every device. Gradients lie as the parameters do.

  Returns:
    A function of the state, images [B, H, W, C] and labels [B] that returns the
    next state. Its sums grow by the step's mean loss, accuracy and the global norm
    of the gradient (without L2).
  """

  def loss_and_aux(
    params: Any, model_state: Any, key: jax.Array, images: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    with sharded_activations(mesh, len(images), enabled=sharding is not None):
      logits, model_state = model.apply(
        {"params": params, **model_state},
        images,
        train=True,
        rngs={"dropout": key},
        mutable=list(model_state),
      )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    accuracy = (logits.argmax(-1) == labels).astype(jnp.float32).mean()
    return loss, (model_state, accuracy)

  gradient = jax.value_and_grad(loss_and_aux, has_aux=True)

  def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    key = jax.random.fold_in(state.random_keys().dropout, state.step)

    def accumulate(total: Any, part: Any) -> tuple[Any, None]:
      grads, loss, accuracy, model_state = total
      images, labels, index = part
      images, labels = jax.lax.with_sharding_constraint(
        (images, labels), batch_sharding(mesh)
      )
      (part_loss, (model_state, part_accuracy)), part_grads = gradient(
        state.params, model_state, jax.random.fold_in(key, index), images, labels
      )
      if sharding is not None:
        part_grads = jax.lax.with_sharding_constraint(part_grads, sharding.params)
      grads = jax.tree.map(jnp.add, grads, part_grads)
      return (grads, loss + part_loss, accuracy + part_accuracy, model_state), None

    # A sum over many parts needs more than bfloat16's 8 bits.
    zeros = jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
      state.params,
    )
    total = (zeros, jnp.zeros(()), jnp.zeros(()), state.model_state)
    if accumulation_steps == 1:
      total, _ = accumulate(total, (images, labels, 0))
    else:
      # Parts are consecutive, so that a batch has the same ghost batches however it
      # is cut. Devices exchange images for it, which are small beside activations.
      parts = jax.tree.map(
        lambda x: x.reshape(accumulation_steps, -1, *x.shape[1:]), (images, labels)
      )
      total, _ = jax.lax.scan(
        accumulate, total, (*parts, jnp.arange(accumulation_steps))
      )
    grads, loss, accuracy, model_state = total
    grads = jax.tree.map(
      lambda grad, p: (grad / accumulation_steps).astype(p.dtype), grads, state.params
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    sums = state.sums
    return state.replace(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      model_state=model_state,
      opt_state=opt_state,
      sums=Sums(
        steps=sums.steps + 1,
        loss=sums.loss + loss / accumulation_steps,
        accuracy=sums.accuracy + accuracy / accumulation_steps,
        grad_norm=sums.grad_norm + optax.tree.norm(grads),
      ),
    )

  return train_step


def is_finite(state: TrainState) -> jax.Array:
  """Tells whether the losses of this epoch and the parameters are finite."""
  # Not the norms: their squares overflow where the numbers themselves do not.
  leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]
  return jnp.stack([jnp.isfinite(state.sums.loss), *leaves]).all()


def _start_epoch(state: TrainState, steps_per_epoch: int) -> TrainState:
  """Returns a state whose sums begin anew if its next step is an epoch's first."""
  starts_epoch = state.step % steps_per_epoch == 0
  return state.replace(
    sums=jax.tree.map(lambda x: jnp.where(starts_epoch, 0, x), state.sums)
  )


def make_next_batch(
  augment: Augment, *, num_examples: int, batch_size: int
) -> Callable[[TrainState, in_memory.DeviceSplit], tuple[jax.Array, jax.Array]]:
  """Returns a function, to be traced, that gives what a state's next step trains on.

  Args:
    augment: maps a key and uint8 images to the network's input.
    num_examples: size of the training set.
    batch_size: examples of one step.

  Returns:
    A function of the state and the training set that returns images, augmented as that
    step does, and labels.
  """
  steps_per_epoch = in_memory.steps_per_epoch(num_examples, batch_size)

  def next_batch(
    state: TrainState, split: in_memory.DeviceSplit
  ) -> tuple[jax.Array, jax.Array]:
    keys = state.random_keys()
    permutation = in_memory.epoch_permutation(
      keys.order, state.step // steps_per_epoch, num_examples
    )
    images, labels = in_memory.train_batch(
      split, permutation, state.step % steps_per_epoch, batch_size
    )
    return augment(jax.random.fold_in(keys.augment, state.step), images), labels

  return next_batch


def make_train_steps(
  train_step: TrainStep,
  augment: Augment,
  *,
  num_examples: int,
  batch_size: int,
  mesh: Mesh,
  sharding: TrainState | None = None,
) -> jax.stages.Wrapped:
  """Returns a jitted function that takes many steps of one epoch in one dispatch.

  The number of steps is an argument of the compiled program: how a run is cut into
  dispatches changes neither its result nor what is compiled.

  Args:
    train_step: one step.
    augment: maps a key and uint8 images to the network's input.
    num_examples: size of the training set.
    batch_size: examples of one step.
    mesh: the mesh.
    sharding: how the state lies on it, before and after; None: whole on every device.

  Returns:
    A function of the state (donated), the training set and the number of steps,
    which must not pass the end of the epoch. It returns the next state and whether
    that is finite; it stops after the first step that is not.
  """
  steps_per_epoch = in_memory.steps_per_epoch(num_examples, batch_size)

  def train_steps(
    state: TrainState, split: in_memory.DeviceSplit, num_steps: jax.Array
  ) -> tuple[TrainState, jax.Array]:
    keys = state.random_keys()
    permutation = in_memory.epoch_permutation(
      keys.order, state.step // steps_per_epoch, num_examples
    )
    last = state.step + num_steps
    state = _start_epoch(state, steps_per_epoch)

    def body(carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
      state, _ = carry
      images, labels = jax.lax.with_sharding_constraint(
        in_memory.train_batch(
          split, permutation, state.step % steps_per_epoch, batch_size
        ),
        batch_sharding(mesh),
      )
      images = augment(jax.random.fold_in(keys.augment, state.step), images)
      state = train_step(state, images, labels)
      return state, is_finite(state)

    return jax.lax.while_loop(
      lambda carry: (carry[0].step < last) & carry[1], body, (state, is_finite(state))
    )

  state_sharding = replicated(mesh) if sharding is None else sharding
  return jax.jit(
    train_steps,
    donate_argnums=0,
    in_shardings=(state_sharding, replicated(mesh), replicated(mesh)),
    out_shardings=(state_sharding, replicated(mesh)),
    compiler_options=compiler_options(),
  )


def make_streamed_step(
  train_step: TrainStep,
  preprocess: Callable[[jax.Array], jax.Array],
  *,
  steps_per_epoch: int,
  mesh: Mesh,
  sharding: TrainState | None = None,
) -> jax.stages.Wrapped:
  """Returns a jitted function that takes one step on a batch from the host.

  Args:
    train_step: one step.
    preprocess: maps uint8 images to the network's input.
    steps_per_epoch: number of steps in an epoch.
    mesh: the mesh.
    sharding: how the state lies on it, before and after; None: whole on every device.

  Returns:
    A function of the state (donated), whether that is finite, images [B, H, W, C] and
    labels [B], that returns the next state and whether that is finite. A state that is
    not stays as it is, so that calls need not wait for each other.
  """

  def streamed_step(
    state: TrainState, finite: jax.Array, images: jax.Array, labels: jax.Array
  ) -> tuple[TrainState, jax.Array]:
    def step(state: TrainState) -> TrainState:
      return train_step(
        _start_epoch(state, steps_per_epoch), preprocess(images), labels
      )

    state = jax.lax.cond(finite, step, lambda state: state, state)
    return state, finite & is_finite(state)

  state_sharding = replicated(mesh) if sharding is None else sharding
  return jax.jit(
    streamed_step,
    donate_argnums=0,
    in_shardings=(
      state_sharding,
      replicated(mesh),
      batch_sharding(mesh),
      batch_sharding(mesh),
    ),
    out_shardings=(state_sharding, replicated(mesh)),
    compiler_options=compiler_options(),
  )


def make_evaluate(
  model: nn.Module,
  preprocess: Callable[[jax.Array], jax.Array],
  *,
  mesh: Mesh,
  sharding: TrainState | None = None,
) -> Callable[[TrainState, in_memory.EvalBatches], EvalSums]:
  """Returns a jitted function that evaluates a split, or a part of one.

  Args:
    model: the network, called as `model(images, train)`.
    preprocess: maps uint8 images to the network's input.
    mesh: the mesh.
    sharding: how the state lies on it; None: whole on every device.

  Returns:
    A function of the state and the split's batches that counts every example once.
  """

  def evaluate(state: TrainState, batches: in_memory.EvalBatches) -> EvalSums:
    variables = {"params": state.params, **state.model_state}

    def add(sums: EvalSums, batch: in_memory.EvalBatches) -> tuple[EvalSums, None]:
      images = preprocess(batch.images)
      with sharded_activations(mesh, len(images), enabled=sharding is not None):
        logits: Any = model.apply(variables, images, train=False)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
      correct = logits.argmax(-1) == batch.labels
      of_label = jnp.take_along_axis(logits, batch.labels[:, None], axis=-1)
      # A logit that is not a number is above none and below none: no answer is right.
      in_top5 = ((logits > of_label).sum(-1) < 5) & jnp.isfinite(losses)
      parts = EvalSums(
        examples=batch.mask,
        loss=jnp.where(batch.mask, losses, 0),
        correct=correct & batch.mask,
        top5_correct=in_top5 & batch.mask,
      )
      return jax.tree.map(lambda total, part: total + part.sum(), sums, parts), None

    zero = jnp.zeros((), jnp.int32)
    sums, _ = jax.lax.scan(add, EvalSums(zero, jnp.zeros(()), zero, zero), batches)
    return sums

  return jax.jit(
    evaluate,
    in_shardings=(
      replicated(mesh) if sharding is None else sharding,
      batch_sharding(mesh, axis=1),
    ),
    out_shardings=replicated(mesh),
    compiler_options=compiler_options(),
  )
