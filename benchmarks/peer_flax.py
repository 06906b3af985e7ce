"""The same networks in plain Flax, as one writes them without this package.

The ResNet is written like Flax's ImageNet example, and has batch norm and version 1.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from benchmarks.peer import L2, LEARNING_RATE, MOMENTUM, Case, Step


class BasicBlock(nn.Module):
  """Pre-activation block of two 3x3 convolutions (He et al., ECCV 2016)."""

  features: int
  strides: int
  method: str
  dtype: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, H, W, C] to [N, H / strides, W / strides, features]."""
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)

    def normalize(x: jax.Array) -> jax.Array:
      if self.method == "batch_norm":
        x = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)
      return nn.relu(x)

    y = normalize(x)
    if self.strides != 1 or x.shape[-1] != self.features:
      x = conv(self.features, (1, 1), self.strides)(y)
    y = conv(self.features, (3, 3), self.strides)(y)
    y = conv(self.features, (3, 3))(normalize(y))
    if self.method == "skipinit":
      y = self.param("alpha", nn.initializers.zeros, ()).astype(y.dtype) * y
    return x + y


class WideResNet(nn.Module):
  """Wide-ResNet for small images (Zagoruyko & Komodakis, BMVC 2016)."""

  depth: int
  width: int
  method: str
  num_classes: int = 10
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [N, H, W, C] to logits."""
    x = nn.Conv(16, (3, 3), use_bias=False, dtype=self.dtype)(x)
    for stage, strides in enumerate((1, 2, 2)):
      for index in range((self.depth - 4) // 6):
        features = 2 ** (4 + stage) * self.width
        stride = 1 if index else strides
        x = BasicBlock(features, stride, self.method, self.dtype)(x)
    if self.method == "batch_norm":
      x = nn.BatchNorm(use_running_average=False, dtype=self.dtype)(x)
    x = nn.relu(x).mean((1, 2))
    return nn.Dense(self.num_classes, dtype=self.dtype)(x)


class BottleneckBlock(nn.Module):
  """Post-activation block of 1x1, 3x3 and 1x1 convolutions (He et al., CVPR 2016)."""

  features: int
  strides: int
  conv: Any
  norm: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [N, H, W, C] to [N, H / strides, W / strides, 4 features]."""
    y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
    y = nn.relu(self.norm()(self.conv(self.features, (3, 3), self.strides)(y)))
    y = self.conv(4 * self.features, (1, 1))(y)
    y = self.norm(scale_init=nn.initializers.zeros)(y)
    if x.shape != y.shape:
      x = self.norm()(self.conv(4 * self.features, (1, 1), self.strides)(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
  """ResNet-50 with batch norm for large images."""

  num_classes: int
  dtype: str = "float32"
  blocks: Sequence[int] = (3, 4, 6, 3)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images [N, H, W, C] to logits."""
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    norm = functools.partial(
      nn.BatchNorm,
      use_running_average=False,
      momentum=0.9,
      epsilon=1e-5,
      dtype=self.dtype,
    )
    x = nn.relu(norm()(conv(64, (7, 7), 2, padding=[(3, 3), (3, 3)])(x)))
    x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
    for stage, blocks in enumerate(self.blocks):
      for index in range(blocks):
        strides = 2 if stage and not index else 1
        x = BottleneckBlock(64 * 2**stage, strides, conv, norm)(x)
    return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


def plain_step(
  case: Case,
  init: Callable[..., Any],
  apply: Callable[..., Any],
  sharding: Any = None,
) -> Step:
  """Returns a train step as one writes it in JAX, by optax.

  Args:
    init: returns parameters and statistics from a key and images.
    apply: returns logits and statistics from parameters, statistics and images.
    sharding: where all arrays are; None: on the default device.
  """
  optimizer = optax.chain(
    optax.add_decayed_weights(L2), optax.sgd(LEARNING_RATE, MOMENTUM)
  )

  def first() -> Any:
    params, stats = init(jax.random.key(0), jnp.zeros((1, *case.batch_shape[1:])))
    return params, stats, optimizer.init(params)

  def loss(params: Any, stats: Any, images: Any, labels: Any) -> Any:
    logits, stats = apply(params, stats, images)
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), stats

  names = () if sharding is None else ("in_shardings", "out_shardings")
  where = dict.fromkeys(names, sharding)

  @functools.partial(jax.jit, donate_argnums=0, **where)
  def train_step(state: Any, images: Any, labels: Any) -> Any:
    params, stats, opt_state = state
    grads, stats = jax.grad(loss, has_aux=True)(params, stats, images, labels)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), stats, opt_state

  shapes = (
    jax.eval_shape(first),
    jax.ShapeDtypeStruct(case.batch_shape, jnp.float32),
    jax.ShapeDtypeStruct(case.batch_shape[:1], jnp.int32),
  )
  return Step(train_step, shapes, first)


def jitted_step(case: Case, sharding: Any = None, *, compile_init: bool = True) -> Step:
  """Returns the train step of a case."""
  assert not case.remat
  if case.width:
    model: Any = WideResNet(
      case.depth, case.width, case.method, case.num_classes, case.dtype
    )
  else:
    assert (case.depth, case.version, case.method) == (50, 1, "batch_norm")
    model = ResNet(case.num_classes, case.dtype)
  model_init = jax.jit(model.init) if compile_init else model.init

  def init(key: jax.Array, images: jax.Array) -> Any:
    variables = dict(model_init(key, images))
    return variables.pop("params"), variables

  def apply(params: Any, stats: Any, images: jax.Array) -> Any:
    return model.apply({"params": params, **stats}, images, mutable=[*stats])

  return plain_step(case, init, apply, sharding)


def take_steps(step: Step, images: jax.Array, labels: jax.Array) -> Callable[[], None]:
  """Returns a function that takes one step on a batch, and waits until it is done."""
  state = step.init()

  def take() -> None:
    nonlocal state
    state = step.apply(state, images, labels)
    jax.block_until_ready(state)

  return take


def make_step(case: Case, *, compile_init: bool = True) -> Callable[[], None]:
  """Returns a function that takes one step."""
  batch = map(jnp.asarray, case.batch())
  return take_steps(jitted_step(case, compile_init=compile_init), *batch)


def device_peak_bytes() -> int | None:
  """Returns the most memory of an accelerator that this process had."""
  if jax.default_backend() == "cpu":
    return None
  stats = jax.local_devices()[0].memory_stats()
  return stats["peak_bytes_in_use"] if stats else None
