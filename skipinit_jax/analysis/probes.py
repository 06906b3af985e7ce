"""What is measured of a block, whatever framework calls it.

A measurement is one forward and one backward pass. Who runs the network gives `probe`
each block's input and output, and `end` the last block's output; `differentiate` runs
it backward, and `assemble` makes a `Signal` of what was recorded. Derivatives are never
stored: a slot is a scalar variable of zero whose "derivative" is a mean square, taken
where the derivative is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from skipinit_jax.analysis.signal import Signal, require_two_examples
from skipinit_jax.errors import UsageError
from skipinit_jax.layers.scaling import wide

Record = dict[str, Any]
"""What is known of a block, or of several that a scan has stacked.

`input` and `output`, and `skip` and `branch` where they are known: each the
`statistics` of these features. `sum`, the second moment of skip path plus branch, where
they are known. `moving_variance` and `alpha`, and the cosine of an example's
`positions` behind the block, where there are such.
`gradient`: the derivatives of the block's `slots`.
"""


SLOTS = ("input", "output", "spread", "end", "last")
"""The names of a block's slots; `last` is above zero in the last block."""


def slots(x: Any) -> dict[str, jax.Array]:
  """Returns a block's slots for features like x."""
  return dict.fromkeys(SLOTS, jnp.zeros((), wide(x).dtype))


@jax.custom_vjp
def probe(x: jax.Array, slot: jax.Array, spread: jax.Array | None = None) -> jax.Array:
  """Returns x; the slots' "derivatives" are statistics of x's derivative.

  Args:
    x: features [N, ..., channels].
    slot: for the mean square.
    spread: for the part of the mean square that is not at the position with most of it.
  """
  return x


def _probe_forward(
  x: jax.Array, slot: jax.Array, spread: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
  return x, spread


def _probe_backward(
  spread: jax.Array | None, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  x = wide(cotangent)
  if spread is not None:
    scaled, _ = _in_range(x)
    at = jnp.square(scaled.reshape(len(x), -1, x.shape[-1])).mean((0, 2))
    total = at.sum()
    spread = jnp.where(total > 0, 1 - at.max() / jnp.where(total > 0, total, 1), 1)
  return cotangent, second_moment(x), spread


probe.defvjp(_probe_forward, _probe_backward)


@jax.custom_vjp
def end(
  y: jax.Array, slot: jax.Array, last: jax.Array, key: jax.Array | None
) -> jax.Array:
  """Returns the last block's output for the head, what stands behind.

  The slot's derivative is that with respect to the logarithm of y's size, of which
  `differentiate` makes the head's elasticity.

  Args:
    y: the block's output.
    slot: `slots`' `end`.
    last: whether this call is the last block's; a scan does not know before.
    key: where there is one, the head sees y at a second moment of one, and what goes
      back through y is white noise of variance one instead of the head's gradient.
  """
  return _end_forward(y, slot, last, key)[0]


def _end_forward(
  y: jax.Array, slot: jax.Array, last: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, Any]:
  if key is not None:
    x, _ = _in_range(wide(y))
    square = jnp.square(x).mean()
    size = jnp.where(last & (square > 0), square, 1) ** 0.5
    y = jnp.where(last, x / size, y).astype(y.dtype)
  return y, (y, last, key)


def _end_backward(
  kept: tuple[jax.Array, jax.Array, jax.Array | None], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
  y, last, key = kept
  size = jnp.where(last, (wide(y) * wide(cotangent)).sum(), 0)
  if key is not None:
    # Noise for every block of a scan would take a good part of a pass's time. They all
    # have this key, and one draws.
    key = jax.random.clone(key)
    cotangent = jax.lax.cond(
      last,
      lambda: jax.random.normal(key, y.shape, wide(y).dtype).astype(y.dtype),
      lambda: cotangent,
    )
  return cotangent, size, None, None


end.defvjp(_end_forward, _end_backward)


def differentiate(
  run: Callable[[Any], tuple[Any, Any]],
  slots: Any,
  loss: Callable[[Any], jax.Array] | None,
) -> tuple[Any, Any, jax.Array]:
  """Runs a network with its probes forward and backward.

  Args:
    run: takes the slots, and returns the network's outputs and what was recorded.
    slots: those of all blocks, in any tree.
    loss: whose gradient is measured, a function of the outputs; None: `end` puts noise
      in its place.

  Returns:
    The slots' derivatives, what was recorded, and the head's elasticity: see
    `Signal.head`.
  """

  def objectives(slots: Any) -> tuple[list[jax.Array], Any]:
    outputs, records = run(slots)
    size, known = _log_size(outputs)
    values = [size] if loss is None else [size, loss(outputs)]
    return values, (records, known)

  values, pull, (records, known) = jax.vjp(objectives, slots, has_aux=True)

  def derivatives(which: int) -> Any:
    seeds = [jnp.zeros_like(value) for value in values]
    seeds[which] += 1
    return pull(seeds)[0]

  of_size = derivatives(0)
  ends = [
    leaf.sum()
    for path, leaf in jax.tree.leaves_with_path(of_size)
    if path[-1] == jax.tree_util.DictKey("end")
  ]
  head = jnp.where(known, sum(ends), 1)
  return of_size if loss is None else derivatives(1), records, head


def _log_size(outputs: Any) -> tuple[jax.Array, jax.Array]:
  """Returns the logarithm of what tells examples apart in outputs, and if there is any.

  Several outputs count alike.
  """
  total, count = jnp.zeros(()), jnp.zeros(())
  for leaf in jax.tree.leaves(outputs):
    if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.ndim:
      continue
    leaf = wide(leaf)
    leaf -= leaf.mean(0, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.abs(leaf).max())
    usable = jnp.isfinite(largest) & (largest > 0)
    square = jnp.square(jnp.where(usable, leaf / jnp.where(usable, largest, 1), 1))
    total += jnp.where(usable, jnp.log(square.sum()) / 2, 0)
    count += usable.astype(count.dtype)
  return total / jnp.maximum(count, 1), count > 0


def assemble(
  names: Sequence[str],
  records: Sequence[Record],
  head: jax.Array | None,
  order: Sequence[int] | None = None,
) -> Signal:
  """Returns the signal of blocks of which this is known.

  Args:
    names: the blocks' names, d of them.
    records: a `Record` of each block, or of several that are stacked.
    head: see `Signal.head`.
    order: where each block is among the records; None: one after the other.
  """
  records = [dict(each) for each in records]
  places = np.arange(len(names)) if order is None else np.array(order)
  sizes = [record["output"]["cosine"].size for record in records]
  known = {
    name: np.repeat([name in record for record in records], sizes)[places].tolist()
    for name in ("skip", "branch", "sum", "moving_variance", "positions")
  }
  for record in records:
    for name in ("skip", "branch"):
      record.setdefault(name, jax.tree.map(jnp.zeros_like, record["output"]))
    for name in ("sum", "moving_variance", "positions"):
      record.setdefault(name, jnp.zeros_like(record["output"]["cosine"]))
  if not all("alpha" in record for record in records):
    records = [record | {"alpha": None} for record in records]
  rows = jax.tree.map(
    lambda *leaves: jnp.concatenate([leaf.reshape(-1) for leaf in leaves]), *records
  )
  if (np.diff(places) < 0).any():
    rows = jax.tree.map(lambda leaf: leaf[places], rows)

  def stream(name: str) -> jax.Array:
    return jnp.append(rows["input"][name][:1], rows["output"][name])

  def partly(values: jax.Array, name: str) -> Any:
    return values if all(known[name]) else _Partial(values, tuple(known[name]))

  gradient = rows["gradient"]
  return Signal(
    names=tuple(names),
    second_moment=stream("second_moment"),
    variance=stream("variance"),
    cosine=stream("cosine"),
    gradient_second_moment=jnp.append(gradient["input"][:1], gradient["output"]),
    skip_second_moment=partly(rows["skip"]["second_moment"], "skip"),
    skip_variance=partly(rows["skip"]["variance"], "skip"),
    branch_second_moment=partly(rows["branch"]["second_moment"], "branch"),
    branch_variance=partly(rows["branch"]["variance"], "branch"),
    sum_second_moment=partly(rows["sum"], "sum"),
    moving_variance=partly(rows["moving_variance"], "moving_variance"),
    position_cosine=partly(rows["positions"], "positions"),
    gradient_spread=partly(gradient["spread"], "positions"),
    alpha=rows["alpha"],
    head=head,
  )


@struct.dataclass
class _Partial:
  """Values of which some are not known.

  Not a number says so to users, but in compiled code JAX's search for errors would stop
  there.
  """

  values: jax.Array
  known: tuple[bool, ...] = struct.field(pytree_node=False)


def with_unknown(signal: Signal) -> Signal:
  """Returns a signal that is not a number where it is not known."""

  def fill(field: Any) -> Any:
    if not isinstance(field, _Partial):
      return field
    known, values = np.array(field.known), field.values
    if isinstance(values, jax.core.Tracer):
      # A function of the user's is compiled around it.
      return jnp.where(known, values, jnp.nan)
    return np.where(known, jax.device_get(values), np.float32(np.nan))

  return jax.tree.map(fill, signal, is_leaf=lambda leaf: isinstance(leaf, _Partial))


def record(x: jax.Array, y: jax.Array, parts: Mapping[str, jax.Array]) -> Record:
  """Returns what is known of a block before the backward pass.

  Args:
    x: its input.
    y: its output.
    parts: its `skip` and `branch` where they were seen, else they are what the shapes
      of x and y let one know; and any other entry of a `Record`.
  """
  parts = dict(parts)
  if x.shape == y.shape:
    parts.setdefault("skip", x)
  if "skip" in parts:
    parts.setdefault("branch", y - parts["skip"])
    parts["sum"] = second_moment(wide(parts["skip"]) + wide(parts["branch"]))
  features = {"input": x, "output": y} | {
    name: parts.pop(name) for name in ("skip", "branch") if name in parts
  }
  if math.prod(y.shape[1:-1]) > 1:
    parts["positions"] = _cosine(wide(y).reshape(len(y), -1, y.shape[-1])).mean()
  return {**{name: statistics(each) for name, each in features.items()}, **parts}


def require_examples(inputs: Any) -> None:
  """Raises a UsageError if a batch, an array or a tree of arrays, has no pair."""
  sizes = [
    leaf.shape[0] for leaf in jax.tree.leaves(inputs) if getattr(leaf, "ndim", 0)
  ]
  if not sizes:
    raise UsageError(
      f"The batch is a {type(inputs).__name__} without arrays of examples, [N, ...]."
    )
  require_two_examples(sizes[0])


def require_features(block: str, **features: Any) -> None:
  """Raises a UsageError if a block's input or output is no array of numbers."""
  for name, x in features.items():
    dtype = getattr(x, "dtype", None)
    if dtype is None:
      raise UsageError(
        f"The {name} of block {block!r} is a {type(x).__name__}: a block's first "
        "argument, and its result or the first of several, are an array of features."
      )
    if not jnp.issubdtype(dtype, jnp.floating):
      raise UsageError(
        f"The {name} of block {block!r} has dtype {dtype}: choose blocks that take and "
        "return features, such as those behind the embedding of tokens."
      )
    if x.ndim < 2:
      raise UsageError(
        f"The {name} of block {block!r} has shape {x.shape}: it must be [N, ...] with "
        "the examples first and the channels last."
      )


def variance(x: jax.Array) -> jax.Array:
  """Returns the variance in each channel, averaged over channels."""
  return x.var(tuple(range(x.ndim - 1))).mean()


def second_moment(x: jax.Array) -> jax.Array:
  """Returns the mean square."""
  x, factor = _in_range(x)
  return jnp.square(x).mean() * factor


def _in_range(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns x over a power of two, and the square of that."""
  # The sum of many large squares overflows before their mean does.
  scale = jnp.where(jnp.abs(x).max() < 2.0**40, 1.0, 2.0**40).astype(x.dtype)
  return x / scale, scale**2


def statistics(x: jax.Array) -> dict[str, jax.Array]:
  """Returns the second moment, variance and cosine of features [N, ..., channels]."""
  x = wide(x)
  square, cosine = second_moment(x), _cosine(x.reshape(len(x), -1))
  x, factor = _in_range(x)
  return {
    "second_moment": square,
    "variance": variance(x) * factor,
    "cosine": cosine,
  }


def _cosine(rows: jax.Array) -> jax.Array:
  """Returns the mean cosine similarity of two different of n rows [..., n, size]."""
  # Squares overflow long before the features do, but a direction has no scale.
  largest = jnp.abs(rows).max(-1, keepdims=True)
  rows /= jnp.maximum(largest, jnp.finfo(rows.dtype).tiny)
  squares = jnp.square(rows).sum(-1, keepdims=True)
  rows *= jax.lax.rsqrt(jnp.maximum(squares, 1))
  pairs = jnp.square(rows.sum(-2)).sum(-1) - jnp.square(rows).sum((-2, -1))
  count = rows.shape[-2]
  return pairs / (count * (count - 1))
