"""A residual network as a sum of 2^d paths."""

import numpy as np
from numpy.typing import ArrayLike

from skipinit_jax.errors import UsageError


def path_weights(branch_share: ArrayLike) -> np.ndarray:
  """Returns the weight of the paths of each length in the network's output.

  A path takes, at each of d blocks, the skip path or the branch; its length is the
  number of branches (Veit, Wilber & Belongie, NeurIPS 2016). Branches are independent
  of skip paths at initialization, so the second moments of the 2^d paths add up to the
  output's, and are products over blocks. With block l's branch making up the share p_l
  of its sum, the weight of length k is the coefficient of z^k in

      prod_l ((1 - p_l) + p_l z),

  which is the distribution of the number of successes in d independent trials
  (Poisson's binomial). A constant factor on a block's sum cancels. So

  - unnormalized, or divided by sqrt(2): p_l = 1/2, binomial: typically d / 2 branches;
  - batch normalization: p_l = 1 / (l + 1) for a first input of second moment one,
    about log(d) branches (De & Smith, NeurIPS 2020): the network is shallow;
  - SkipInit: p_l = alpha^2 / (1 + alpha^2), typically one branch for alpha = 1 /
    sqrt(d), and none for alpha = 0.

  Assumes that branches keep the proportions of their inputs' paths. In a wide network
  at initialization, linear branches do, and by homogeneity branches with ReLU; what a
  branch's own ReLU mixes between paths is counted with the branch.

  Args:
    branch_share: p_l, [d]: see `Signal.branch_share`, from theory or measured.

  Returns:
    The weights, [d + 1], which sum to one.

  Raises:
    UsageError: a share is outside of [0, 1].
  """
  shares = np.asarray(branch_share, np.float64)
  if shares.ndim != 1 or not np.all((shares >= 0) & (shares <= 1)):
    raise UsageError("branch_share must be one number in [0, 1] for each block.")
  weights = np.ones(1)
  for share in shares:
    weights = np.append(weights * (1 - share), 0.0) + np.append(0.0, weights * share)
  return weights


def mean_path_length(weights: ArrayLike) -> float:
  """Returns the mean length of the paths, in branches."""
  weights = np.asarray(weights)
  return float(weights @ np.arange(len(weights)))
