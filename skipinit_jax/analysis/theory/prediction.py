"""The signal and its gradient through a wide residual network at initialization."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from skipinit_jax import models
from skipinit_jax.analysis.signal import Signal, require_two_examples
from skipinit_jax.analysis.theory.kernel import (
  BatchNorm,
  Kernel,
  Layer,
  Operation,
)
from skipinit_jax.analysis.theory.network import Block, Network, describe
from skipinit_jax.errors import UsageError


def predict(network: Network, inputs: Kernel, batch_size: int) -> Signal:
  """Predicts the signal at initialization, in the limit of infinite width.

  Forward, the branch's last weights are independent of the skip path and centered, so
  kernels add: through x' = a (S(x) + alpha F(x)),

      K' = a^2 (K_S + alpha^2 K_F).

  Backward, with the transposed maps S* and F* of the operations (see `Operation`),

      G = a^2 (S* G' + alpha^2 F* G').

  The gradient is that of a scalar whose derivative with respect to the last block's
  output is white noise of variance one: independent between examples and positions.

  Where He-initialized layers keep second moments (no borders, no transitions) and a
  branch has one layer, the stream's second moment m_l, its variance over the batch v_l,
  the gradient's second moment g_l and the cosine c_l of two inputs behind block l are:

  - Unnormalized, and SkipInit: m_l = (1 + alpha^2)^l m_0 and g_l = (1 +
    alpha^2)^(d - l). For alpha = 1 (or without alpha) the signal doubles at every
    block, forward and backward. For alpha = 1 / sqrt(d) both grow at most by e; for
    alpha = 0, not at all. The ratio of branch to skip path is alpha^2.
  - Division of the sum by sqrt(2): m_l = m_0 and g_l = 1, perfect in both directions.
    But with ReLU c' = (c + k(c)) / 2, k being the normalized arc-cosine kernel, as in
    the unnormalized network: the factor changes lengths, not angles. As 1 - k(c) =
    (1 - c) - 2 sqrt(2) / (3 pi) (1 - c)^(3/2) + ..., in deep networks

        1 - c_l = 18 pi^2 / l^2

    to leading order: inputs become indistinguishable. For other alpha, l counts 2
    alpha^2 / (1 + alpha^2) times; with alpha = 1 / sqrt(d) inputs stay apart at any d.
    Linear networks keep all angles.
  - Batch normalization on the branch: m_l = m_0 + l, as normalized features have
    second moment one. With ReLU the examples of a large batch leave a branch with
    cosine 1 / pi, so v_l = v_0 + (1 - 1 / pi) l: the ratio of branch to skip path is
    about 1 / l, and c_l tends to 1 / pi. Backward g_(l-1) / g_l = 1 + 1 / v_(l-1), so
    gradients grow towards the input as (d / l)^1.47, the power being 1 / (1 - 1 / pi)
    (and its mth power for branches of m layers). In linear networks v_l = v_0 + l, and
    the power is 1.
  - Batch normalization, sum divided by sqrt(2): m' = (m + 1) / 2 tends to one, v to 1 -
    1 / pi, c to 1 / pi, and branch and skip path weigh the same at every depth. So
    g_(l-1) / g_l tends to (1 + 1 / v) / 2 = 1.23: gradients explode, though the forward
    signal is perfect.
  - Standardized weights that keep the variance, and branches of x / beta, with beta^2
    = 1 + l alpha^2 (NF-ResNet without its learnable scalar, as in timm; with it, which
    starts at zero, nothing grows): m_l = beta^2, as x has second moment one and
    channels of mean zero. Branches of orthogonal inputs are orthogonal, so c = 0 stays
    0. Backward, a layer with its activation multiplies by 1 / (1 - 1 / pi) = 1.47, so
    gradients grow towards the input as ((1 + d alpha^2) / (1 + l alpha^2))^1.47 (and
    its mth power for branches of m layers).
  - Fixup: the last layer of each branch is zero, and so is the branch: m_l = m_0, g_l
    = 1. Batch normalization whose last scale in each branch is zero does the same:
    normalization then has no part in it, but for the transitions below.
  - A transition behind normalization forgets the stream's scale: with He
    initialization its skip path starts at second moment one. Without normalization the
    skip path keeps that scale.
  - What stands behind the last block (a normalizer at the output only, dropout, a
    classifier of zeros) changes nothing here.

  Sources: De & Smith (NeurIPS 2020) for the second moments; Yang & Schoenholz (NeurIPS
  2017) for cosines and gradients of residual networks without normalization; Yang et
  al. (ICLR 2019) for batch normalization.

  In a network of n channels, the logarithm of a second moment behind l blocks has a
  mean and a variance of order (p_1 + ... + p_l) / n around this, with the branches'
  shares p of their sums (see `path_weights`): l / (2 n) without normalization (Hanin &
  Nica, 2018), log(l) / n with it.

  Assumes infinitely many channels, independent centered weights, gradients
  independent of the forward pass, and exchangeable examples (see `Kernel`) without
  features that are exactly zero: there, as on the blank border of an image, ReLU passes
  no gradient, while theory counts one half.

  Args:
    inputs: the kernel of the stem's input, or without a stem the first block's.
    batch_size: N, examples of the batch over which statistics are taken.

  Returns:
    The signal of d blocks, float64.

  Raises:
    UsageError: the kernel is on another grid, the batch has fewer than two examples,
      or there are no blocks.
  """
  require_two_examples(batch_size)
  if not network.blocks:
    raise UsageError("The network has no residual blocks.")
  if inputs.grid != network.grid:
    raise UsageError(
      f"The inputs' kernel is on a grid of {inputs.grid}, the network's is "
      f"{network.grid}."
    )
  stem = () if network.stem is None else (network.stem,)
  stream = [_forward(stem, inputs, batch_size)[-1]]
  rows = []
  for block in network.blocks:
    trunk, shortcut, branch = _inside(block, stream[-1], batch_size)
    skip, scaled = shortcut[-1], branch[-1] * block.alpha**2
    stream.append((skip + scaled) * block.sum_scale**2)
    rows.append(
      (
        skip.second_moment,
        skip.variance(batch_size),
        scaled.second_moment,
        scaled.variance(batch_size),
        _moving_variance(block, trunk, branch, batch_size),
      )
    )
  noise = np.eye(len(stream[-1].same))
  gradient = Kernel(noise, np.zeros_like(noise), stream[-1].grid)
  gradients = [gradient.second_moment]
  for block, kernel in zip(network.blocks[::-1], stream[-2::-1], strict=True):
    # Kernels inside the block are computed again: keeping them would take many times
    # the memory, of P^2 numbers each.
    trunk, shortcut, branch = _inside(block, kernel, batch_size)
    total = gradient * block.sum_scale**2
    gradient = _backward(block.shortcut, total, shortcut, batch_size) + _backward(
      block.branch, total * block.alpha**2, branch, batch_size
    )
    gradient = _backward(block.trunk, gradient, trunk, batch_size)
    gradients.append(gradient.second_moment)
  skip_moment, skip_variance, branch_moment, branch_variance, moving = np.array(rows).T
  return Signal(
    names=tuple(block.name for block in network.blocks),
    second_moment=np.array([kernel.second_moment for kernel in stream]),
    variance=np.array([kernel.variance(batch_size) for kernel in stream]),
    cosine=np.array([kernel.cosine for kernel in stream]),
    gradient_second_moment=np.array(gradients[::-1]),
    skip_second_moment=skip_moment,
    skip_variance=skip_variance,
    branch_second_moment=branch_moment,
    branch_variance=branch_variance,
    sum_second_moment=skip_moment + branch_moment,
    moving_variance=moving,
  )


def predict_model(
  model: models.ResidualMLP | models.WideResNet | models.ResNet, inputs: ArrayLike
) -> Signal:
  """Predicts the signal of a model of this package for a batch of inputs.

  The batch's examples are taken as exchangeable (see `Kernel.of`).

  Args:
    model: a model whose stem is one linear layer: `ResidualMLP` or `WideResNet`.
    inputs: a batch, as the model takes it.

  Returns:
    The signal, float64. `predict` says what it assumes.

  Raises:
    UsageError: the model is a ResNet; the batch has fewer than two examples.
  """
  x = np.asarray(inputs)
  network = describe(model, x.shape)
  stem = network.stem
  if stem is None:
    raise UsageError(
      "A ResNet's max pool has no closed form: call predict(describe(model, shape), "
      "kernel, batch_size) with the kernel of the first block's input."
    )
  if network.grid == (1, 1):
    x = x.reshape(len(x), -1)
  if not stem.standardized:
    return predict(network, Kernel.of(x), len(x))
  behind_stem = _standardized_stem(stem, x)
  network = dataclasses.replace(network, stem=None, grid=behind_stem.grid)
  return predict(network, behind_stem, len(x))


def _standardized_stem(stem: Layer, x: np.ndarray) -> Kernel:
  """Kernel behind standardized weights on images, whose pixels have a mean.

  The weights of an output feature are uniform on the sphere of the N - 1 dimensions in
  which they sum to zero, N = k^2 n.
  """
  fan_in = stem.size**2 * x.shape[-1]
  inputs = Kernel.of(x)
  means = stem.window_means(x.mean(-1).reshape(len(x), *inputs.grid))
  unseen = Kernel.of(means[..., None]) * -stem.weight_variance
  return (stem.forward(inputs, len(x)) + unseen) * (fan_in / (fan_in - 1))


def _inside(
  block: Block, kernel: Kernel, batch_size: int
) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
  """Returns the kernels in a block's trunk, shortcut and branch, from its input."""
  trunk = _forward(block.trunk, kernel, batch_size)
  shortcut = _forward(block.shortcut, trunk[-1], batch_size)
  return trunk, shortcut, _forward(block.branch, trunk[-1], batch_size)


def _forward(
  operations: Iterable[Operation], kernel: Kernel, batch_size: int
) -> list[Kernel]:
  """Returns the kernels of the input and behind each operation."""
  kernels = [kernel]
  for operation in operations:
    kernels.append(operation.forward(kernels[-1], batch_size))
  return kernels


def _backward(
  operations: Sequence[Operation],
  gradient: Kernel,
  kernels: Sequence[Kernel],
  batch_size: int,
) -> Kernel:
  for operation, kernel in zip(operations[::-1], kernels[-2::-1], strict=True):
    gradient = operation.backward(gradient, kernel, batch_size)
  return gradient


def _moving_variance(
  block: Block, trunk: Sequence[Kernel], branch: Sequence[Kernel], batch_size: int
) -> float:
  """Returns the variance at the block's first batch normalization; NaN: it has none."""
  for operations, kernels in ((block.trunk, trunk), (block.branch, branch)):
    for operation, kernel in zip(operations, kernels, strict=False):
      if isinstance(operation, BatchNorm):
        return kernel.variance(operation.batch_size or batch_size)
  return float("nan")
