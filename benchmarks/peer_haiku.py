"""The same ResNets in Haiku, as one writes them without this package.

With batch norm it is Haiku's own. "skipinit" and "nf_resnet" are pre-activation
networks written out here; they stand for what a user of Haiku would write.
"""

import contextlib
import functools
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import numpy as np

from benchmarks.peer import Case, Step
from benchmarks.peer_flax import plain_step

_BLOCKS = (3, 4, 6, 3)
_RELU_GAIN = (2 / (1 - 1 / np.pi)) ** 0.5


class _StandardizedConv(hk.Conv2D):
  """Brock, De & Smith (ICLR 2021): weights of mean zero and norm one, and a gain."""

  def __call__(self, x: jax.Array) -> jax.Array:
    features = x.shape[-1], self.output_channels
    init = self.w_init or hk.initializers.VarianceScaling()
    w = hk.get_parameter("w", (*self.kernel_shape, *features), init=init)
    gain = hk.get_parameter("gain", features[1:], init=jnp.ones)
    b = hk.get_parameter("b", features[1:], init=jnp.zeros)
    wide = w.astype(jnp.float32)
    wide = wide - wide.mean((0, 1, 2))
    squares = jnp.square(wide).sum((0, 1, 2))
    w = (wide * jax.lax.rsqrt(jnp.maximum(squares, 1e-4))).astype(w.dtype) * gain
    y = jax.lax.conv_general_dilated(
      x, w, self.stride, self.padding, dimension_numbers=self.dimension_numbers
    )
    return y + b


def _scale(x: jax.Array, factor: float) -> jax.Array:
  return x * (hk.get_parameter("alpha", (), x.dtype, init=jnp.zeros) * factor)


def _network(images: jax.Array, method: str, num_classes: int) -> jax.Array:
  """Pre-activation bottleneck blocks, x + alpha f(x) (He et al., ECCV 2016)."""
  standardized = method == "nf_resnet"
  conv: Any = (
    _StandardizedConv
    if standardized
    else functools.partial(
      hk.Conv2D, with_bias=False, w_init=hk.initializers.VarianceScaling(2.0)
    )
  )
  gain, branch_factor = (_RELU_GAIN, 0.2) if standardized else (1.0, 1.0)

  def relu(x: jax.Array) -> jax.Array:
    return gain * jax.nn.relu(x)

  x = conv(64, 7, 2, name="stem")(images)
  x = hk.max_pool(x, (3, 3, 1), (2, 2, 1), "SAME")
  variance = 1.0
  for stage, blocks in enumerate(_BLOCKS):
    features = 64 * 2**stage
    for index in range(blocks):
      with hk.name_scope(f"block{stage}_{index}"):
        stride = 2 if stage and not index else 1
        y = relu(x / variance**0.5 if standardized else x)
        shortcut = x if index else conv(4 * features, 1, stride, name="projection")(y)
        y = relu(conv(features, 1, name="conv1")(y))
        y = relu(conv(features, 3, stride, name="conv2")(y))
        y = conv(4 * features, 1, name="conv3")(y)
        x = shortcut + _scale(y, branch_factor)
      variance = (variance if index else 1.0) + branch_factor**2
  x = relu(x).astype(jnp.float32).mean((1, 2))
  return hk.Linear(num_classes, w_init=jnp.zeros, name="classifier")(x)


def jitted_step(case: Case, sharding: Any = None) -> Step:
  """Returns the train step of a ResNet-50 of version 1 with batch norm, or of 2."""
  assert not case.width and case.depth == 50 and not case.remat
  own = hk.nets.ResNet50
  whole, narrow = (
    jmp.Policy(jnp.float32, jnp.dtype(dtype), jnp.dtype(case.dtype))
    for dtype in ("float32", case.dtype)
  )
  # As in Haiku's ImageNet example, which sets them for the whole process.
  policies = ((own, narrow), (hk.Conv2D, narrow), (hk.BatchNorm, whole))

  def forward(images: jax.Array) -> jax.Array:
    with contextlib.ExitStack() as stack:
      for module, policy in (*policies, (_StandardizedConv, narrow)):
        stack.enter_context(hk.mixed_precision.push_policy(module, policy))
      return classify(images)

  def classify(images: jax.Array) -> jax.Array:
    if case.method == "batch_norm":
      bn_config = {"decay_rate": 0.9}
      return own(case.num_classes, bn_config, resnet_v2=case.version == 2)(images, True)
    return _network(images.astype(case.dtype), case.method, case.num_classes)

  net = hk.transform_with_state(forward)

  def apply(params: Any, stats: Any, images: jax.Array) -> Any:
    return net.apply(params, stats, None, images)

  return plain_step(case, net.init, apply, sharding)
