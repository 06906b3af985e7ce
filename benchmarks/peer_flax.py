"""The same network in plain Flax, as one writes it without this package."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks.peer import L2, LEARNING_RATE, MOMENTUM, NUM_CLASSES, Case


class BasicBlock(nn.Module):
  """Pre-activation block of two 3x3 convolutions (He et al., ECCV 2016)."""

  features: int
  strides: int
  method: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, H, W, C] to [N, H / strides, W / strides, features]."""

    def normalize(x: jax.Array) -> jax.Array:
      if self.method == "batch_norm":
        x = nn.BatchNorm(use_running_average=False)(x)
      return nn.relu(x)

    y = normalize(x)
    if self.strides != 1 or x.shape[-1] != self.features:
      x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False)(y)
    y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(y)
    y = nn.Conv(self.features, (3, 3), use_bias=False)(normalize(y))
    if self.method == "skipinit":
      y = self.param("alpha", nn.initializers.zeros, ()) * y
    return x + y


class WideResNet(nn.Module):
  """Wide-ResNet for small images (Zagoruyko & Komodakis, BMVC 2016)."""

  depth: int
  width: int
  method: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [N, H, W, C] to logits."""
    x = nn.Conv(16, (3, 3), use_bias=False)(x)
    for stage, strides in enumerate((1, 2, 2)):
      for index in range((self.depth - 4) // 6):
        features = 2 ** (4 + stage) * self.width
        x = BasicBlock(features, 1 if index else strides, self.method)(x)
    if self.method == "batch_norm":
      x = nn.BatchNorm(use_running_average=False)(x)
    return nn.Dense(NUM_CLASSES)(nn.relu(x).mean((1, 2)))


def make_step(case: Case, *, compile_init: bool) -> Callable[[], None]:
  """Returns a function that takes one step."""
  assert not case.remat
  model = WideResNet(case.depth, case.width, case.method)
  optimizer = optax.chain(
    optax.add_decayed_weights(L2), optax.sgd(LEARNING_RATE, MOMENTUM)
  )
  images, labels = map(jnp.asarray, case.batch())
  init = jax.jit(model.init) if compile_init else model.init
  variables: Any = init(jax.random.key(0), images[:1])
  params = variables["params"]
  stats = {name: value for name, value in variables.items() if name != "params"}
  opt_state = optimizer.init(params)

  def loss(params: Any, stats: Any) -> Any:
    logits, stats = model.apply({"params": params, **stats}, images, mutable=[*stats])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), stats

  @jax.jit
  def train_step(params: Any, stats: Any, opt_state: Any) -> Any:
    grads, stats = jax.grad(loss, has_aux=True)(params, stats)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state

  def step() -> None:
    nonlocal params, stats, opt_state
    params, stats, opt_state = train_step(params, stats, opt_state)
    jax.block_until_ready(params)

  return step
