"""Random augmentation and normalization of image batches, on the device.

Each function is pure and may be jitted with the batch axis sharded over a mesh:
what happens to an example depends on the key and on its position in the global
batch, never on how the batch is divided over devices.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = [
  "augment",
  "mixup",
  "normalize",
  "pad_and_crop",
  "random_flip",
]


def augment(
  key: jax.Array, images: jax.Array, crop_padding: int, flip: bool
) -> jax.Array:
  """Crops and mirrors a batch of images at random.

  Args:
    images: [batch, height, width, channels], any dtype.
    crop_padding: see `pad_and_crop`; 0: no crop.
    flip: whether to mirror: see `random_flip`.

  Returns:
    Images of the same shape and dtype.
  """
  crop_key, flip_key = jax.random.split(key)
  if crop_padding:
    images = pad_and_crop(crop_key, images, crop_padding)
  return random_flip(flip_key, images) if flip else images


def normalize(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
  """Scales images to 0..1, subtracts the mean and divides by the deviation.

  Args:
    images: uint8 [..., height, width, channels].
    mean: per channel, of images in 0..1: [channels].
    std: likewise.

  Returns:
    Images of the same shape, in float32: a network casts them to its own dtype.
  """
  scaled = images.astype(jnp.float32) / 255
  axes = tuple(range(images.ndim - 1))
  mean, std = (
    jnp.expand_dims(jnp.asarray(each, jnp.float32), axes) for each in (mean, std)
  )
  return (scaled - mean) / std


def mixup(
  key: jax.Array, images: jax.Array, concentration: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mixes every image with another one of the batch, all by the same weight.

  Zhang et al. (ICLR 2018): the weight is Beta-distributed, and the images' loss is the
  mean of both labels' losses by the same weight.

  Args:
    images: [batch, ...], normalized.
    concentration: both parameters of the Beta distribution, above 0: the paper's alpha.

  Returns:
    The mixed images; the indices of the others, [batch]; and the first image's weight.
  """
  weight_key, order_key = jax.random.split(key)
  weight = jax.random.beta(weight_key, concentration, concentration, dtype=jnp.float32)
  others = jax.random.permutation(order_key, len(images))
  mixed = weight * images + (1 - weight) * images[others]
  return mixed.astype(images.dtype), others, weight


def pad_and_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
  """Shifts every image by a random offset of its own.

  It pads each image with zeros on all sides and cuts out a window of the former size.
  All (2 padding + 1)^2 positions are equally likely. Apply it before `normalize`, as
  torchvision's `RandomCrop` is applied: the padding is then black, and uint8 images are
  a quarter of the memory traffic.

  Args:
    images: [batch, height, width, channels], any dtype.
    padding: pixels added on each side.

  Returns:
    Images of the same shape and dtype.
  """
  batch, *shape = images.shape
  padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
  offsets = jax.random.randint(key, (batch, 2), 0, 2 * padding + 1)

  def crop(image: jax.Array, offset: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), shape)

  return jax.vmap(crop)(padded, offsets)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors every image left to right with probability 1/2.

  Args:
    images: [batch, height, width, channels], any dtype.

  Returns:
    Images of the same shape and dtype.
  """
  flip = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
  return jnp.where(flip, images[:, :, ::-1], images)
