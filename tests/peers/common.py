"""What tests against independent code share: variables, gradients, and comparisons."""

import contextlib
import functools
import importlib.machinery
import importlib.util
import re
import sys
import types

import jax
import numpy as np
from flax import traverse_util

from skipinit_jax.models import unroll_variables
from tests.models import common

FLOAT64 = {"dtype": np.float64, "param_dtype": np.float64}
# By the number of a kernel's axes: ours in the order of PyTorch's.
AXES = {4: (3, 2, 0, 1), 2: (1, 0)}


@contextlib.contextmanager
def float64():
  """Computes in 64 bits, where a difference of 1e-12 is none of rounding."""
  with jax.enable_x64(True), jax.default_matmul_precision("highest"):
    yield


class _Anything(type):
  """A class that has every attribute, each another such class."""

  def __getattr__(cls, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return _Anything(name, (), {})


class _Torchvision:
  """Finds modules without content: timm imports torchvision, and computes without."""

  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] == "torchvision":
      return importlib.machinery.ModuleSpec(name, self, is_package=True)
    return None

  def create_module(self, spec):
    module = types.ModuleType(spec.name)
    module.__getattr__ = lambda name: getattr(_Anything("torchvision", (), {}), name)
    return module

  def exec_module(self, module):
    pass


@contextlib.contextmanager
def torchvision():
  """Lets timm import torchvision, or a stand-in where it is not installed."""
  finders = [] if importlib.util.find_spec("torchvision") else [_Torchvision()]
  sys.meta_path += finders
  try:
    yield
  finally:
    for finder in finders:
      sys.meta_path.remove(finder)
      for name in [each for each in sys.modules if each.startswith("torchvision")]:
        del sys.modules[name]


def random_variables(model, images):
  """Variables in float64, none at its initial value: by tuples of names, unrolled."""
  variables = common.random_variables(model, images, train=False)
  flat = traverse_util.flatten_dict(unroll_variables(variables))
  # A scalar of NumPy is no array.
  return {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}


def place_of_block(path):
  """Returns a block's stage and its place there, and the names below the block.

  Args:
    path: the names of a variable of a block, without its collection.
  """
  first, *rest = path
  stage, kind = re.fullmatch(r"stage(\d)_(first|rest)", first).groups()
  block = 0 if kind == "first" else 1 + int(rest.pop(0).removeprefix("block"))
  return int(stage) - 1, block, rest


def run(model, variables, images, labels, *, evaluate=True):
  """Runs a network of this package as the peers are run.

  Returns:
    Logits in evaluation, or None; then, in training, logits, the gradients of the mean
    cross-entropy by tuples of names, and the statistics afterwards.
  """
  tree = traverse_util.unflatten_dict(variables)
  params, state = tree["params"], {k: v for k, v in tree.items() if k != "params"}

  def loss(params, state, images):
    logits, new = model.apply(
      {"params": params, **state}, images, train=True, mutable=[*state]
    )
    return cross_entropy(logits, labels), (logits, new)

  apply = jax.jit(functools.partial(model.apply, train=False))
  evaluated = np.asarray(apply(tree, images)) if evaluate else None
  # The statistics are an argument: XLA folds constants for minutes.
  gradients, (logits, new) = jax.jit(jax.grad(loss, has_aux=True))(
    params, state, images
  )
  flat = traverse_util.flatten_dict({"params": gradients, **new})
  parts = ({}, {})
  for path, leaf in flat.items():
    parts[path[0] != "params"][path] = np.asarray(leaf)
  return evaluated, np.asarray(logits), *parts


def cross_entropy(logits, labels):
  """The mean cross-entropy."""
  return -jax.nn.log_softmax(logits)[np.arange(len(labels)), labels].mean()


def to_torch(path, array):
  """Returns a variable, or its gradient, as PyTorch has it."""
  return array.transpose(AXES[array.ndim]) if path[-1] == "kernel" else array


def assert_same(actual, expected, tolerance=1e-11):
  """Compares arrays by name, relative to each one's largest number."""
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    value = np.asarray(value)
    assert actual[name].dtype == value.dtype == np.float64
    error = np.abs(actual[name] - value).max() / max(np.abs(value).max(), 1e-3)
    assert error < tolerance, (name, error)
