"""The train step, many of them in one dispatch, and evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from skipinit_jax.compilation import compiler_options
from skipinit_jax.data import augmentation, in_memory
from skipinit_jax.training.mesh import (
  batch_sharding,
  replicated,
  sharded_activations,
)
from skipinit_jax.training.state import EpochMetrics, TrainState

# The number by which mixup's key is derived from the step's: no part of a batch has it.
_MIXUP = 2**31 - 1

TrainStep = Callable[[TrainState, jax.Array, jax.Array], TrainState]

Batch = tuple[jax.Array, jax.Array]
"""What a step trains on: the network's input [B, H, W, C], and labels [B]."""

Batches = Callable[[TrainState, Any], Callable[[jax.Array], Batch]]
"""Gives the batches of a state's epoch, in a traced function.

It takes the state and the data of a dispatch, and returns a function of the step's
number that returns the batch which this step trains on.
"""


class EvalMetrics(NamedTuple):
  """Metrics of evaluated examples, as sums, so that batches can be added up.

  Attributes:
    examples: number of examples.
    loss: sum of their cross-entropies.
    correct: number of examples whose largest logit is the label's.
    top5_correct: number of examples whose label is among the five largest logits.
  """

  examples: jax.Array
  loss: jax.Array
  correct: jax.Array
  top5_correct: jax.Array

  def means(self) -> dict[str, float]:
    """Returns the means over the examples, by name."""
    examples, loss, correct, top5_correct = map(float, jax.device_get(self))
    return {
      "loss": loss / examples,
      "accuracy": correct / examples,
      "top5_accuracy": top5_correct / examples,
    }


def make_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  *,
  mesh: Mesh,
  sharding: TrainState,
  accumulation_steps: int = 1,
  label_smoothing: float = 0.0,
  mixup: float = 0.0,
) -> TrainStep:
  """Returns one optimizer step, to be called under `jax.jit`.

  Args:
    model: the network, called as `model(images, train)`.
    mesh: the mesh whose axis `data` shares the batch.
    sharding: how the state lies on the mesh, from `state_sharding`. Gradients lie as
      the parameters do.
    accumulation_steps: parts of the batch, in order, whose gradients are added up
      one after the other. Normalization sees one part at a time, and each part's
      running statistics follow those of the part before.
    label_smoothing: the share of each label that all classes get alike.
    mixup: the concentration of the weights that mix images; see `augmentation.mixup`.

  Returns:
    A function of the state, images [B, H, W, C] and labels [B] that returns the
    next state. The epoch's metrics grow by the step's mean loss, accuracy and the
    global norm of the gradient (without L2).
  """

  def scores(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    if label_smoothing:
      targets = jax.nn.one_hot(labels, logits.shape[-1])
      targets = optax.smooth_labels(targets, label_smoothing)
      loss = optax.softmax_cross_entropy(logits, targets).mean()
    else:
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    accuracy = (logits.argmax(-1) == labels).astype(jnp.float32).mean()
    return loss, accuracy

  def loss_and_aux(
    params: Any,
    model_state: Any,
    key: jax.Array,
    weight: jax.Array | None,
    images: jax.Array,
    *labels: jax.Array,
  ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    with sharded_activations(mesh, len(images), sharding.params):
      logits, model_state = model.apply(
        {"params": params, **model_state},
        images,
        train=True,
        rngs={"dropout": key},
        mutable=list(model_state),
      )
    loss, accuracy = scores(logits, labels[0])
    if weight is not None:
      other_loss, other_accuracy = scores(logits, labels[1])
      loss = weight * loss + (1 - weight) * other_loss
      accuracy = weight * accuracy + (1 - weight) * other_accuracy
    return loss, (model_state, accuracy)

  gradient = jax.value_and_grad(loss_and_aux, has_aux=True)

  def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> TrainState:
    key = jax.random.fold_in(state.random_keys().dropout, state.step)
    batch: tuple[jax.Array, ...] = (images, labels)
    weight = None
    if mixup:
      mix_key = jax.random.fold_in(key, _MIXUP)
      images, others, weight = augmentation.mixup(mix_key, images, mixup)
      batch = (images, labels, labels[others])

    def accumulate(total: Any, part: Any) -> tuple[Any, None]:
      grads, loss, accuracy, model_state = total
      *examples, index = part
      examples = jax.lax.with_sharding_constraint(examples, batch_sharding(mesh))
      part_key = jax.random.fold_in(key, index)
      (part_loss, (model_state, part_accuracy)), part_grads = gradient(
        state.params, model_state, part_key, weight, *examples
      )
      part_grads = jax.lax.with_sharding_constraint(part_grads, sharding.params)
      grads = jax.tree.map(jnp.add, grads, part_grads)
      return (grads, loss + part_loss, accuracy + part_accuracy, model_state), None

    # A sum over many parts needs more than bfloat16's 8 bits.
    zeros = jax.tree.map(
      lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)),
      state.params,
    )
    zero = jnp.zeros((), jnp.float32)
    total = (zeros, zero, zero, state.model_state)
    if accumulation_steps == 1:
      total, _ = accumulate(total, (*batch, 0))
    else:
      # Parts are consecutive, so that a batch has the same ghost batches however it
      # is cut. Devices exchange images for it, which are small beside activations.
      parts = jax.tree.map(
        lambda x: x.reshape(accumulation_steps, -1, *x.shape[1:]), batch
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
      sums=EpochMetrics(
        steps=sums.steps + 1,
        loss=sums.loss + loss / accumulation_steps,
        accuracy=sums.accuracy + accuracy / accumulation_steps,
        grad_norm=sums.grad_norm + optax.tree.norm(grads),
      ),
    )

  return train_step


def is_finite(state: TrainState) -> jax.Array:
  """Tells whether the losses of this epoch and the parameters are finite."""
  # Norms would not do: their squares overflow where the numbers do not.
  leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)]
  return jnp.stack([jnp.isfinite(state.sums.loss), *leaves]).all()


def make_train_steps(
  train_step: TrainStep,
  batches: Batches,
  *,
  steps_per_epoch: int,
  mesh: Mesh,
  sharding: TrainState,
) -> jax.stages.Wrapped:
  """Returns a jitted function that takes many steps of one epoch in one dispatch.

  The number of steps is an argument of the compiled program: how a run is cut into
  dispatches changes neither its result nor what is compiled.

  Args:
    batches: gives the batches of the steps.
    steps_per_epoch: number of steps in an epoch.
    sharding: how the state lies on the mesh, before and after.

  Returns:
    A function of the state (donated), the data that `batches` takes, and the number of
    steps, which must not pass the end of the epoch. It returns the next state and
    whether that is finite; it stops after the first step that is not.
  """

  def train_steps(
    state: TrainState, data: Any, num_steps: jax.Array
  ) -> tuple[TrainState, jax.Array]:
    batch_of = batches(state, data)
    last = state.step + num_steps
    starts_epoch = state.step % steps_per_epoch == 0
    state = state.replace(
      sums=jax.tree.map(lambda x: jnp.where(starts_epoch, 0, x), state.sums)
    )

    def body(carry: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
      state, _ = carry
      state = train_step(state, *batch_of(state.step))
      return state, is_finite(state)

    return jax.lax.while_loop(
      lambda carry: (carry[0].step < last) & carry[1], body, (state, is_finite(state))
    )

  return jax.jit(
    train_steps,
    donate_argnums=0,
    in_shardings=(sharding, None, replicated(mesh)),
    out_shardings=(sharding, replicated(mesh)),
    compiler_options=compiler_options(),
  )


def make_evaluate(
  model: nn.Module,
  preprocess: Callable[[jax.Array], jax.Array],
  *,
  mesh: Mesh,
  sharding: TrainState,
) -> Callable[[TrainState, in_memory.EvalBatches], EvalMetrics]:
  """Returns a jitted function that evaluates a split, or a part of one.

  Args:
    model: the network, called as `model(images, train)`.
    preprocess: maps uint8 images to the network's input.
    sharding: how the state lies on the mesh.

  Returns:
    A function of the state and the split's batches that counts every example once.
  """

  def evaluate(state: TrainState, batches: in_memory.EvalBatches) -> EvalMetrics:
    variables = {"params": state.params, **state.model_state}

    def add(
      sums: EvalMetrics, batch: in_memory.EvalBatches
    ) -> tuple[EvalMetrics, None]:
      images = preprocess(batch.images)
      with sharded_activations(mesh, len(images), sharding.params):
        logits: Any = model.apply(variables, images, train=False)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
      correct = logits.argmax(-1) == batch.labels
      of_label = jnp.take_along_axis(logits, batch.labels[:, None], axis=-1)
      # A logit that is not a number is above none and below none: no answer is right.
      in_top5 = ((logits > of_label).sum(-1) < 5) & jnp.isfinite(losses)
      parts = EvalMetrics(
        examples=batch.mask,
        loss=jnp.where(batch.mask, losses, 0),
        correct=correct & batch.mask,
        top5_correct=in_top5 & batch.mask,
      )
      # The dtype of a sum would be wider where JAX computes in 64 bits.
      return jax.tree.map(
        lambda total, part: total + part.sum(dtype=total.dtype), sums, parts
      ), None

    count, loss = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
    sums, _ = jax.lax.scan(add, EvalMetrics(count, loss, count, count), batches)
    return sums

  return jax.jit(
    evaluate,
    in_shardings=(sharding, batch_sharding(mesh, axis=1)),
    out_shardings=replicated(mesh),
    compiler_options=compiler_options(),
  )
