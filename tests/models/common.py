"""Variables for models, without compiling an initialization."""

import jax
import numpy as np


def random_variables(module, *args, **kwargs):
  """Random variables of a module, none at a value that would hide its place.

  Args:
    *args, **kwargs: what the module's `init` takes beside the key.
  """
  generator = np.random.default_rng(0)

  def draw(path, leaf):
    name = path[-1].key
    if name == "kernel":
      # A kernel of a scanned stack has one more axis, in front.
      axes = -2 if "dense" in str(path) or "classifier" in str(path) else -4
      fan_in = np.prod(leaf.shape[max(axes, -leaf.ndim) : -1])
      return generator.normal(0, fan_in**-0.5, leaf.shape).astype(np.float32)
    if name in ("var", "scale"):
      return generator.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
    return generator.normal(0.1, 0.3, leaf.shape).astype(np.float32)

  shapes = jax.eval_shape(
    lambda key: module.init(key, *args, **kwargs), jax.random.key(0)
  )
  return jax.tree.map_with_path(draw, shapes)
