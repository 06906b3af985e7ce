"""The page of the paper in pictures: its numbers are those of its command."""

import json
import re
from pathlib import Path

import pytest

from experiments import concepts
from skipinit_jax.analysis import theory

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = " ".join((ROOT / "docs/concepts.md").read_text(encoding="utf-8").split())
NUMBERS = json.loads((ROOT / "docs/figures/concepts.json").read_text(encoding="utf-8"))

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


def test_numbers_are_what_theory_predicts():
  images = concepts.make_images()
  for name, numbers in INITIAL.items():
    signal = theory.predict_model(concepts.make_network(name), images)
    predicted = concepts.signal_numbers(signal)
    assert predicted == pytest.approx(numbers["theory"], rel=1e-3, abs=1e-12)


def test_pictures_are_those_of_the_command():
  drawn = {path.name for path in (ROOT / "docs/figures").glob("*.png")}
  assert set(re.findall(r"\(figures/(\w+\.png)\)", TEXT)) == drawn
