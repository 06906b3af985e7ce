"""Covariances of a wide network's features, and how its layers change them.

At initialization, the channels of a layer whose weights are independent and centered
are, in the limit of many channels, independent and identically distributed, with a
Gaussian distribution over examples and positions (Neal, 1996; Matthews et al., ICLR
2018; Novak et al., ICLR 2019, for positions). Its covariance, the kernel, is then all
there is to know, and each operation of the network is a map of kernels. The kernel of
the gradients obeys the transposed maps if forward and backward weights are treated as
independent (Schoenholz et al., ICLR 2017).

Here the examples of a batch are exchangeable: each has the same covariance with
itself and with any other. A kernel is then two matrices over positions.
"""

import dataclasses
from typing import Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from skipinit_jax.analysis.signal import require_two_examples
from skipinit_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Covariance of one channel's features, for exchangeable examples.

  The kernel of features is their uncentered second moment; the kernel of gradients has
  the same form. P is the number of positions: height times width, and 1 for fully
  connected layers.

  Attributes:
    same: between the positions of one example, [P, P].
    other: between the positions of two different examples, [P, P].
    grid: height and width.
  """

  same: np.ndarray
  other: np.ndarray
  grid: tuple[int, int] = (1, 1)

  @classmethod
  def uniform(
    cls, second_moment: float, cosine: float, grid: tuple[int, int] = (1, 1)
  ) -> Self:
    """Returns the kernel of examples that are equally long and equally similar.

    Args:
      second_moment: mean square of the features, at every position.
      cosine: cosine similarity of two examples, and of two positions.

    Raises:
      UsageError: the second moment is not positive, or the cosine is outside of
        [-1, 1].
    """
    if second_moment <= 0:
      raise UsageError(f"second_moment is {second_moment}: it must be positive.")
    if not -1 <= cosine <= 1:
      raise UsageError(f"cosine is {cosine}: it must be in [-1, 1].")
    positions = grid[0] * grid[1]
    other = np.full((positions, positions), second_moment * cosine)
    same = other + second_moment * (1 - cosine) * np.eye(positions)
    return cls(same, other, grid)

  @classmethod
  def of(cls, features: ArrayLike) -> Self:
    """Returns the kernel of a batch, averaged over channels, examples and pairs.

    Examples are exchangeable only on average, so predictions from this kernel are
    exact for second moments, and otherwise as good as the examples are alike.

    Args:
      features: [N, C] or [N, H, W, C].

    Raises:
      UsageError: there are fewer than two examples, or other axes.
    """
    x = np.asarray(features, np.float64)
    if x.ndim not in (2, 4):
      raise UsageError(f"features have shape {x.shape}: give [N, C] or [N, H, W, C].")
    require_two_examples(len(x))
    grid = (x.shape[1], x.shape[2]) if x.ndim == 4 else (1, 1)
    x = x.reshape(len(x), grid[0] * grid[1], -1)
    size, _, channels = x.shape
    same = np.einsum("npc,nqc->pq", x, x, optimize=True)
    total = x.sum(0)
    other = (total @ total.T - same) / (size - 1)
    return cls(same / (size * channels), other / (size * channels), grid)

  @property
  def diagonal(self) -> np.ndarray:
    """Second moment at each position, [P]."""
    return np.diagonal(self.same)

  @property
  def second_moment(self) -> float:
    """Mean over the positions."""
    return float(self.diagonal.mean())

  @property
  def cosine(self) -> float:
    """Cosine similarity of two examples, over all positions."""
    return float(np.trace(self.other) / np.trace(self.same))

  def variance(self, batch_size: int) -> float:
    """Expected variance of a channel over a batch of examples and their positions.

    The mean of a channel over the batch has variance s / N + (1 - 1 / N) r, with the
    means s and r of `same` and `other`; the rest of the second moment is the variance
    over the batch.
    """
    mean = self._batch_means(batch_size).mean()
    return float(self.second_moment - mean)

  def centered(self, batch_size: int) -> "Kernel":
    """Kernel after the mean over examples and positions is subtracted."""
    means = self._batch_means(batch_size)
    change = means.mean() - means[:, None] - means[None, :]
    return Kernel(self.same + change, self.other + change, self.grid)

  def _batch_means(self, batch_size: int) -> np.ndarray:
    """Covariance of a position with the mean over the batch, [P]."""
    same, other = self.same.mean(1), self.other.mean(1)
    return same / batch_size + other * (1 - 1 / batch_size)

  def inner_product(self, factor: "Kernel", batch_size: int) -> float:
    """Sum over all entries of the two covariance matrices' elementwise product.

    The matrices are those over all examples and positions of a batch.
    """
    same, other = (self.same * factor.same).sum(), (self.other * factor.other).sum()
    return float(batch_size * (same + (batch_size - 1) * other))

  def __add__(self, term: "Kernel") -> "Kernel":
    return Kernel(self.same + term.same, self.other + term.other, self.grid)

  def __mul__(self, factor: float) -> "Kernel":
    return Kernel(self.same * factor, self.other * factor, self.grid)


class Operation(Protocol):
  """A part of a network, as maps of kernels."""

  def forward(self, kernel: Kernel, batch_size: int) -> Kernel:
    """Returns the kernel of the output, given that of the input."""
    ...

  def backward(self, gradient: Kernel, kernel: Kernel, batch_size: int) -> Kernel:
    """Returns the gradients' kernel at the input.

    Args:
      gradient: the gradients' kernel at the output.
      kernel: the features' kernel at the input.
    """
    ...


_Windows = list[tuple[tuple[slice, slice], tuple[slice, slice]]]


def _collect(kernel: Kernel, grid: tuple[int, int], windows: _Windows) -> Kernel:
  """Returns the sum of a kernel over pairs of places on `grid` and what they see."""

  def collect(matrix: np.ndarray) -> np.ndarray:
    images = matrix.reshape(kernel.grid * 2)
    total = np.zeros(grid * 2)
    for here, there in windows:
      total[here * 2] += images[there * 2]
    return total.reshape(grid[0] * grid[1], -1)

  return Kernel(collect(kernel.same), collect(kernel.other), grid)


@dataclasses.dataclass(frozen=True)
class Layer:
  """A dense or convolutional layer with independent centered weights, no bias.

  With weights of variance v / (k^2 n), n the input's channels, and zero padding,

      K'(p, q) = v / k^2 sum_o K(s p + o, s q + o)

  over the k^2 offsets o of the window: where the window leaves the image, the sum has
  fewer terms, so borders lose a part of the second moment. Backward, each input
  position collects from the outputs that see it,

      G(p, q) = v / k^2 (n' / n) sum_o G'((p - o) / s, (q - o) / s),

  with the output's n' channels. He initialization is v = 2 (He et al., ICCV 2015).

  Standardized weights sum to zero, so they do not see the mean of the input over the
  channels and the window. With the channels' mean m(p), this takes from K'(p, q)

      v M(p) M(q),   M(p) = 1 / k^2 sum_o m(s p + o).

  Behind ReLU on centered Gaussian features, m(p)^2 = K(p, p) / pi. Standardization also
  takes a share of the order of 1 / n from the gradients, which is neglected.

  Assumes weights that are independent of the input, and a gradient that is independent
  of the forward pass.

  Attributes:
    weight_variance: v, the weights' variance times the fan-in k^2 n.
    widening: n' / n, the output's channels over the input's.
    size: k, the side of the window.
    strides: s.
    standardized: whether the weights of each output channel sum to zero.
    mean_share: m(p)^2 / K(p, p) of the input: 1 / pi behind ReLU, 0 where the channels'
      mean is zero. Only standardized weights ask.
    symmetric: whether both sides are padded alike, as PyTorch does; otherwise the
      padding is XLA's SAME, as even as possible and the rest at the end.
  """

  weight_variance: float = 2.0
  widening: float = 1.0
  size: int = 1
  strides: int = 1
  standardized: bool = False
  mean_share: float = 0.0
  symmetric: bool = False

  def output_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the output."""
    return (-(-grid[0] // self.strides), -(-grid[1] // self.strides))

  def forward(self, kernel: Kernel, batch_size: int) -> Kernel:
    """See `Operation`."""
    factor = self.weight_variance / self.size**2
    grid = self.output_grid(kernel.grid)
    seen = _collect(kernel, grid, self._windows(kernel.grid)) * factor
    if not self.standardized:
      return seen
    means = np.sqrt(self.mean_share * kernel.diagonal).reshape(kernel.grid)
    window_means = self.window_means(means).ravel()
    unseen = self.weight_variance * np.outer(window_means, window_means)
    return Kernel(seen.same - unseen, seen.other - unseen, seen.grid)

  def backward(self, gradient: Kernel, kernel: Kernel, batch_size: int) -> Kernel:
    """See `Operation`."""
    windows = [(there, here) for here, there in self._windows(kernel.grid)]
    factor = self.weight_variance / self.size**2 * self.widening
    return _collect(gradient, kernel.grid, windows) * factor

  def window_means(self, images: np.ndarray) -> np.ndarray:
    """Means over the windows, with zero padding: [..., H, W] to [..., H', W']."""
    grid = (images.shape[-2], images.shape[-1])
    total = np.zeros(images.shape[:-2] + self.output_grid(grid))
    for here, there in self._windows(grid):
      total[(..., *here)] += images[(..., *there)]
    return total / self.size**2

  def _windows(self, grid: tuple[int, int]) -> _Windows:
    """Outputs and the inputs that they see, for each offset of the window."""
    rows, columns = (self._offsets(size) for size in grid)
    return [
      ((row[0], column[0]), (row[1], column[1])) for row in rows for column in columns
    ]

  def _offsets(self, size: int) -> list[tuple[slice, slice]]:
    outputs = -(-size // self.strides)
    padding = max((outputs - 1) * self.strides + self.size - size, 0)
    before = (self.size if self.symmetric else padding) // 2
    pairs = []
    for offset in range(-before, self.size - before):
      first = max(0, -(offset // self.strides))
      last = min(outputs - 1, (size - 1 - offset) // self.strides)
      if first <= last:
        start = first * self.strides + offset
        stop = last * self.strides + offset + 1
        pairs.append((slice(first, last + 1), slice(start, stop, self.strides)))
    return pairs


def _angles(kernel: Kernel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Product of the standard deviations, angles within and between examples."""
  deviation = np.sqrt(kernel.diagonal)
  scale = deviation[:, None] * deviation[None, :]
  # Where a position is zero, so is its covariance: any angle will do.
  safe = np.where(scale > 0, scale, 1.0)
  same, other = (
    np.arccos(np.clip(matrix / safe, -1, 1)) for matrix in (kernel.same, kernel.other)
  )
  # Rounding must not separate a position from itself: arccos is steep there.
  np.fill_diagonal(same, 0.0)
  return scale, same, other


@dataclasses.dataclass(frozen=True)
class ReLU:
  """The rectifier on centered Gaussian features: the arc-cosine kernels.

  For u and v of variances a and b at an angle t = arccos(K / sqrt(a b)),

      E[relu(u) relu(v)] = sqrt(a b) (sin t + (pi - t) cos t) / (2 pi),
      E[relu'(u) relu'(v)] = (pi - t) / (2 pi)

  (Cho & Saul, NeurIPS 2009). So half of the second moment passes in both directions,
  and similar inputs become more similar: a cosine of 0 becomes 1 / pi, and 1 - c
  shrinks by 2 sqrt(2) / (3 pi) (1 - c)^(3/2) to leading order.

  Assumes Gaussian features of mean zero, and gradients that do not depend on them.
  """

  def forward(self, kernel: Kernel, batch_size: int) -> Kernel:
    """See `Operation`."""
    scale, *angles = _angles(kernel)
    same, other = (
      scale * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
      for angle in angles
    )
    return Kernel(same, other, kernel.grid)

  def backward(self, gradient: Kernel, kernel: Kernel, batch_size: int) -> Kernel:
    """See `Operation`."""
    _, same, other = _angles(kernel)
    return Kernel(
      gradient.same * (np.pi - same) / (2 * np.pi),
      gradient.other * (np.pi - other) / (2 * np.pi),
      gradient.grid,
    )


@dataclasses.dataclass(frozen=True)
class BatchNorm:
  """Batch normalization at initialization (scale one, bias zero), and an activation.

  A channel is centered over the batch and divided by its standard deviation there:

      K' = C K C / (v + epsilon),   v = the mean diagonal of C K C,

  with the centering projection C. So the output's second moment is one whatever the
  input's scale, the variance over the batch v (not the second moment) sets that scale,
  and what all examples share is removed: a batch of equally similar examples leaves
  with cosine -1 / (N - 1). The activation f follows.

  Backward, for normalized features x and the gradient g' behind the activation,

      h = f'(x) g',   g = (h - mean(h) - x mean(x h)) / sqrt(v + epsilon).

  With M features in a channel (examples times positions), the last term removes

      t / M = 1 / M sum over i, j of E[f(x_i) f(x_j)] G'_ij

  of the second moment's sum over the batch, since f'(x) x = f(x). Where all examples
  and positions are alike, this is exact with the covariance of x as its shape:

      G = (C H C - t K' / M^2) / (v + epsilon) D / (D - 2).

  As to the last factor, a channel's variance is a sum over the dimensions in which its
  features vary, D = tr(K')^2 / tr(K'^2) (N - 1 for fully connected layers on equally
  similar examples), and the mean of its inverse is larger than the inverse of its mean
  by the factor of a chi-squared distribution. No such factor arises forward: the length
  that is normalized is independent of the direction that remains. All corrections are
  of order 1 / N. Yang et al. (ICLR 2019) treat finite batches without approximations.

  Assumes gradients g' that do not depend on x, and examples and positions in which
  features vary equally; neither matters for large batches.

  Attributes:
    relu: whether the activation is ReLU; otherwise there is none.
    epsilon: added to the variance. It matters only where v is as small.
    batch_size: examples of a ghost batch; None: statistics are of the whole batch.
  """

  relu: bool = False
  epsilon: float = 1e-5
  batch_size: int | None = None

  def _normalize(self, kernel: Kernel, size: int) -> Kernel:
    return kernel.centered(size) * (1 / (kernel.variance(size) + self.epsilon))

  def forward(self, kernel: Kernel, batch_size: int) -> Kernel:
    """See `Operation`."""
    size = self.batch_size or batch_size
    normalized = self._normalize(kernel, size)
    return ReLU().forward(normalized, size) if self.relu else normalized

  def backward(self, gradient: Kernel, kernel: Kernel, batch_size: int) -> Kernel:
    """See `Operation`.

    Raises:
      UsageError: the features vary in two dimensions or fewer: the gradient's second
        moment is infinite.
    """
    size = self.batch_size or batch_size
    normalized = self._normalize(kernel, size)
    features = size * len(kernel.same)
    squares = normalized.inner_product(normalized, size)
    trace = features * normalized.second_moment
    dimensions = trace**2 / squares if squares > 0 else 0.0
    # Three equally similar examples have two, up to rounding.
    if dimensions < 2 + 1e-6:
      raise UsageError(
        f"A batch of {size} is too small for the gradient of batch normalization: its "
        "second moment is infinite for fewer than 4 different examples."
      )
    overlap = self.forward(kernel, batch_size).inner_product(gradient, size)
    if self.relu:
      gradient = ReLU().backward(gradient, normalized, size)
    result = gradient.centered(size) + normalized * (-overlap / features**2)
    fluctuation = dimensions / (dimensions - 2)
    return result * (fluctuation / (kernel.variance(size) + self.epsilon))


@dataclasses.dataclass(frozen=True)
class ExampleNorm:
  """Layer, group or root-mean-square normalization: each example by itself.

  In a wide network an example's channels have mean zero, and their mean square is its
  second moment q: K' = K / (q + epsilon), and cosines stay. Backward, G = G' / (q +
  epsilon): what n features lose along their own direction is one part in n.

  Assumes groups of many channels.

  Attributes:
    epsilon: added to the second moment.
  """

  epsilon: float = 1e-6

  def forward(self, kernel: Kernel, batch_size: int) -> Kernel:
    """See `Operation`."""
    return kernel * (1 / (kernel.second_moment + self.epsilon))

  def backward(self, gradient: Kernel, kernel: Kernel, batch_size: int) -> Kernel:
    """See `Operation`."""
    return gradient * (1 / (kernel.second_moment + self.epsilon))
