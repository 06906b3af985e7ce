"""What scales the branches of a block, whatever framework calls it.

Who runs the network gives `Scaler.scale` each block as a function, whose layers it may
observe. For the reasoning see `repair`.
"""

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from skipinit_jax.analysis import blocks as blocks_lib
from skipinit_jax.analysis import probes
from skipinit_jax.analysis.blocks import Blocks, Path
from skipinit_jax.errors import UsageError

Observe = Callable[[Path, Mapping[str, int], Any], Any]
"""Sees a call of a module inside of a block, and returns its output or another.

It takes the module's path in the block, its own parameters with their ranks, and its
output.
"""

BlockCall = Callable[[jax.Array, Observe], Any]
"""Calls a block on its features, with one who observes the modules inside of it."""

_INPUT, _LAYER = "repair:input", "repair:layer"


Layers = Mapping[Path, Mapping[str, int]]
"""The last layers of a block's branches.

By path in the block, it has the parameters that scale them, with their ranks.
"""


class Scaler:
  """Scales the branches of blocks, one after the other.

  Attributes:
    blocks: the blocks.
    layers: by the blocks' paths, the last layers that were found.
    share: c / d, each branch's part of the stream.
  """

  share: jax.Array

  def __init__(
    self, blocks: Blocks, last_layers: str | Sequence[str] | None, noise_key: jax.Array
  ) -> None:
    """Takes what `repair` takes.

    Args:
      noise_key: for the noise that stands for the gradient.
    """
    self.blocks = blocks
    self.layers: dict[Path, Layers] = {}
    self._last = [last_layers] if isinstance(last_layers, str) else last_layers
    self._noise_key = noise_key

  def scale(
    self, path: Path, call: BlockCall, x: jax.Array
  ) -> tuple[Any, dict[str, jax.Array]]:
    """Scales the branches of one block.

    Returns:
      Its output, and by name: the `factor`; whether there is a `skip` path; the second
      moment of the `output`; its `growth` against the skip path's, and that of the
      gradient, [2].
    """
    layers = find_layers(call, x, self.blocks.shortcut, self._last, path)
    self.layers[path] = layers

    def terms(factor: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
      """Returns the block's features and what it makes of a gradient; its output."""

      def times(layer: Path, own: Mapping[str, int], output: Any) -> Any:
        if layer not in layers:
          return output
        return (output * factor).astype(output.dtype)

      def features(x: jax.Array) -> tuple[jax.Array, Any]:
        output = call(x, times)
        return blocks_lib.first(output), output

      y, pull, output = jax.vjp(features, x, has_aux=True)
      # The blocks of a scan all have this key.
      key = jax.random.clone(self._noise_key)
      (gradient,) = pull(jax.random.normal(key, y.shape, jnp.float32).astype(y.dtype))
      return (probes.wide(y), probes.wide(gradient)), output

    # Not at zero: where a ReLU follows the sum, its derivative jumps there.
    high = jnp.sqrt(self.share)
    low = high / 16
    at_both, _ = jax.vmap(terms)(jnp.stack([low, high]))
    branch = [(each[1] - each[0]) / (high - low) for each in at_both]
    skip = [each[0] - low * b for each, b in zip(at_both, branch, strict=True)]
    in_skip, in_branch = _moments(skip), _moments(branch)
    ratio = (in_branch / in_skip).max()
    factor = jnp.where(ratio > self.share, jnp.sqrt(self.share / ratio), 1.0)
    # Less is rounding; but where the stream itself has vanished, it says nothing.
    before = jnp.square(probes.wide(x)).mean()
    no_skip = (in_skip[0] < 1e-6 * before) & (in_skip[0] < 1e-9 * in_branch[0])
    no_skip &= before > 1e-30
    scaled, output = terms(factor)
    in_sum = _moments(scaled)
    return output, {
      "factor": factor,
      "skip": ~no_skip * 1.0,
      "output": in_sum[0],
      "growth": in_sum / in_skip,
    }


def _moments(terms: Sequence[jax.Array]) -> jax.Array:
  return jnp.stack([jnp.square(each).mean() for each in terms])


def find_layers(
  call: BlockCall,
  x: jax.Array,
  shortcut: str,
  patterns: Sequence[str] | None,
  path: Path,
) -> Layers:
  """Finds the last layers of a block's branches.

  Args:
    shortcut: the child that projects the skip path; a normalizer behind it has its name
      and "_norm".
    patterns: of the layers' paths; None: what the block's program says.
    path: the block's, for errors.

  Raises:
    UsageError: there are none.
  """
  layers: dict[Path, Mapping[str, int]] = {}

  def tag(layer: Path, own: Mapping[str, int], output: Any) -> Any:
    if layer[0] in (shortcut, f"{shortcut}_norm"):
      return checkpoint_name(output, _INPUT)
    # A bias alone adds something that is no factor of the branch.
    if own.keys() <= {"bias"}:
      return output
    # A kernel beside its own scale is standardized: it has none.
    scales = own.keys() - ({"kernel"} if "scale" in own else ())
    layers[layer] = {name: own[name] for name in own if name in scales}
    return checkpoint_name(output, f"{_LAYER}{list(layers).index(layer)}")

  def tagged(x: jax.Array) -> Any:
    return blocks_lib.first(call(checkpoint_name(x, _INPUT), tag))

  jaxpr = jax.make_jaxpr(tagged)(x).jaxpr
  names = ["/".join(layer) for layer in layers]
  if patterns is None:
    program = _Program(jaxpr, [_Terms] * len(jaxpr.invars))
    chosen = sorted(program.terms(jaxpr.outvars[0]).layers)
  else:
    chosen = [
      index
      for index, name in enumerate(names)
      if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    ]
  if not chosen:
    text = ", ".join(map(repr, names)) or "none"
    which = "not found" if patterns is None else f"none of {', '.join(patterns)}"
    raise UsageError(
      f"The last layer of the branch of block {'/'.join(path)!r} is {which}: name it "
      f"by last_layers, one of its modules with parameters ({text})."
    )
  found = list(layers.items())
  return dict(found[index] for index in chosen)


class _Terms(NamedTuple):
  """What a value is a sum of: outputs of layers, and whether the stream is in it."""

  layers: frozenset[int] = frozenset()
  stream: bool = False

  def plus(self, other: "_Terms") -> "_Terms":
    return _Terms(self.layers | other.layers, self.stream or other.stream)


# What leaves an output where it is, up to a factor for each element.
_ELEMENTWISE = frozenset(
  [
    *("add", "add_any", "sub", "neg", "mul", "div", "max", "min", "select_n", "name"),
    *("convert_element_type", "reduce_precision", "copy", "optimization_barrier"),
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "gather", "rev"),
    *("pad", "concatenate", "reduce_window_sum", "sharding_constraint"),
  ]
)


class _Program:
  """A program of JAX, read from a result back to what it is a sum of."""

  def __init__(self, jaxpr: Any, arguments: Sequence[Callable[[], _Terms]]) -> None:
    self._makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    self._arguments = dict(zip(jaxpr.invars, arguments, strict=True))
    self._known: dict[Any, _Terms] = {}

  def terms(self, value: Any) -> _Terms:
    """Returns what a variable of the program is a sum of."""
    if isinstance(value, jax.extend.core.Literal):
      return _Terms()
    if value not in self._known:
      self._known[value] = self._terms(value)
    return self._known[value]

  def _terms(self, value: Any) -> _Terms:
    if value in self._arguments:
      return self._arguments[value]()
    if value not in self._makers:
      return _Terms()
    eqn = self._makers[value]
    operands = [functools.partial(self.terms, operand) for operand in eqn.invars]
    inner = _called(eqn)
    if inner is not None:
      called = _Program(inner, operands)
      return called.terms(inner.outvars[eqn.outvars.index(value)])
    primitive, name = eqn.primitive.name, eqn.params.get("name")
    if primitive not in _ELEMENTWISE:
      return _Terms()
    if primitive == "name":
      if name == _INPUT:
        return _Terms(stream=True)
      terms = operands[0]()
      # The stream runs through a normalizer of the sum.
      if not name.startswith(_LAYER) or terms.stream:
        return terms
      return _Terms(frozenset({int(name.removeprefix(_LAYER))}))
    if primitive in ("div", "gather"):
      operands = operands[:1]
    elif primitive == "select_n":
      operands = operands[1:]
    found = [operand() for operand in operands]
    if primitive == "mul":
      # One of two factors carries the branch: the one that comes later.
      return max(found, key=lambda terms: (terms.stream, max(terms.layers, default=-1)))
    return functools.reduce(_Terms.plus, found, _Terms())


def _called(eqn: Any) -> Any:
  """Returns the program that an equation calls with its own operands, or None."""
  for value in eqn.params.values():
    inner = getattr(value, "jaxpr", value)
    if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
      return inner
  return None
