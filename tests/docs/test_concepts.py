"""The page of the paper in pictures: its numbers, and the formulas behind them."""

import json
import math
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from skipinit_jax import data, methods, models
from skipinit_jax.analysis import theory

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = " ".join((ROOT / "docs/concepts.md").read_text(encoding="utf-8").split())
NUMBERS = json.loads((ROOT / "docs/figures/concepts.json").read_text(encoding="utf-8"))
DEPTH = 100

INITIAL = NUMBERS["initialization"]
UNNORMALIZED, BATCH_NORM = INITIAL["unnormalized"], INITIAL["batch_norm"]
SKIPINIT, DIVIDED = INITIAL["skipinit_inverse_sqrt_depth"], INITIAL["divide_by_sqrt2"]
TRAINED = NUMBERS["training"]
TRAINED_SKIPINIT, TRAINED_BATCH_NORM = TRAINED["SkipInit, α = 0"], TRAINED["Batch norm"]


@pytest.mark.parametrize(
  ("said", "numbers"),
  [
    (
      "a factor of {:.2g} in theory and {:.2g} as measured",
      [UNNORMALIZED["theory"]["growth"], UNNORMALIZED["measured"]["growth"]],
    ),
    (
      "variance is {:.3f} of the skip path's, in theory and as measured",
      [BATCH_NORM["theory"]["last_branch_to_skip"]],
    ),
    (
      "variance is {:.3f} of the skip path's, in theory and as measured",
      [BATCH_NORM["measured"]["last_branch_to_skip"]],
    ),
    ("it is {:.2f} of it in theory", [UNNORMALIZED["theory"]["last_branch_to_skip"]]),
    ("mean path has {:.0f} branches", [UNNORMALIZED["theory"]["mean_path_length"]]),
    ("and it has {:.1f}: the", [BATCH_NORM["theory"]["mean_path_length"]]),
    (
      "grows by {:.1f} in theory and {:.1f} as measured",
      [SKIPINIT["theory"]["growth"], SKIPINIT["measured"]["growth"]],
    ),
    (
      "the ratio of variances is {:.3f} in every",
      [SKIPINIT["theory"]["last_branch_to_skip"]],
    ),
    (
      "have a cosine of {:.2f} before the first block have one of {:.3f} behind",
      [DIVIDED["theory"]["cosine_before"], DIVIDED["theory"]["cosine_behind"]],
    ),
    (
      "are beyond ±{:.2f}, the largest is {:.2f}, and the median branch has {:.3f} of",
      [
        TRAINED_SKIPINIT["alpha_last"],
        TRAINED_SKIPINIT["alpha_last_max"],
        TRAINED_SKIPINIT["branch_to_skip_last"],
      ],
    ),
    ("against {:.2f} with batch", [TRAINED_BATCH_NORM["branch_to_skip_last"]]),
  ],
)
def test_numbers_are_those_of_the_command(said, numbers):
  # Python writes 1.3e+30 where the page has 1.3e30.
  assert said.format(*numbers).replace("e+", "e") in TEXT


@pytest.fixture(scope="module")
def predicted():
  digits = data.load("digits")
  images = jnp.asarray(digits.train.images[:64])
  images = data.augmentation.normalize(images, digits.mean, digits.std)
  return {
    name: theory.predict_model(
      models.ResidualMLP(DEPTH, 256, num_classes=10, method=methods.get(name)), images
    )
    for name in INITIAL
  }


def test_numbers_are_what_theory_predicts(predicted):
  for name, signal in predicted.items():
    numbers = INITIAL[name]["theory"]
    assert signal.second_moment[-1] / signal.second_moment[0] == pytest.approx(
      numbers["growth"], rel=1e-3
    )
    assert signal.branch_to_skip[-1] == pytest.approx(
      numbers["last_branch_to_skip"], rel=1e-3
    )
    assert signal.cosine[[0, -1]] == pytest.approx(
      [numbers["cosine_before"], numbers["cosine_behind"]], rel=1e-3
    )


def test_formulas_hold(predicted):
  block = np.arange(DEPTH + 1)
  growth = {
    name: signal.second_moment / signal.second_moment[0]
    for name, signal in predicted.items()
  }
  np.testing.assert_allclose(growth["unnormalized"], 2.0**block)
  np.testing.assert_allclose(growth["divide_by_sqrt2"], 1)
  np.testing.assert_allclose(
    growth["skipinit_inverse_sqrt_depth"], (1 + 1 / DEPTH) ** block
  )
  assert growth["skipinit_inverse_sqrt_depth"][-1] < math.e

  normalized = predicted["batch_norm"]
  first = normalized.second_moment[0]
  np.testing.assert_allclose(normalized.second_moment, first + block, rtol=1e-4)
  # The part of the branch in its sum, and the variances' ratio of about 1 / l.
  np.testing.assert_allclose(
    normalized.branch_share, 1 / (first + block[1:]), rtol=1e-4
  )
  np.testing.assert_allclose(normalized.branch_to_skip[9:] * block[10:], 1, atol=0.1)

  cosine = predicted["divide_by_sqrt2"].cosine
  np.testing.assert_allclose(predicted["unnormalized"].cosine, cosine)
  angle = np.arccos(cosine[:-1])
  # Cho & Saul (NIPS 2009).
  kernel = (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / np.pi
  np.testing.assert_allclose(cosine[1:], (cosine[:-1] + kernel) / 2)


def test_pictures_are_those_of_the_command():
  drawn = {path.name for path in (ROOT / "docs/figures").glob("*.png")}
  assert set(re.findall(r"\(figures/(\w+\.png)\)", TEXT)) == drawn
