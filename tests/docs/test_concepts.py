"""The page of the paper in pictures: its numbers are those of its command."""

import json

import pytest

from experiments import concepts, initial_signals
from skipinit_jax import methods
from skipinit_jax.analysis import theory
from tests.forks import ROOT

TEXT = " ".join((ROOT / "docs/concepts.md").read_text(encoding="utf-8").split())
NUMBERS = json.loads((ROOT / "docs/figures/concepts.json").read_text(encoding="utf-8"))

INITIAL, TRAINED = NUMBERS["initialization"], NUMBERS["training"]


def test_numbers_are_those_of_the_command():
  unnormalized, batch_norm = INITIAL["unnormalized"], INITIAL["batch_norm"]
  scaled, divided = (
    INITIAL["skipinit_inverse_sqrt_depth"],
    INITIAL["divide_by_sqrt2"],
  )
  zero = INITIAL[concepts.ZERO_SCALE]
  noise = NUMBERS["initialization_on_noise"]["batch_norm"]
  trained = TRAINED["SkipInit, α = 0"]
  for numbers, said in (
    (unnormalized, "of {theory[growth]:.2g} in theory and {measured[growth]:.2g} as"),
    (unnormalized, "it is {theory[last_branch_to_skip]:.2f} of it in theory"),
    (unnormalized, "mean path has {theory[mean_path_length]:.0f} branches"),
    (batch_norm, "{theory[last_branch_to_skip]:.3f} of the skip path's"),
    (batch_norm, "{measured[last_branch_to_skip]:.3f} of the skip path's"),
    (batch_norm, "and it has {theory[mean_path_length]:.1f}: the"),
    (batch_norm, "factor of {theory[gradient_growth]:.0f} in theory"),
    (batch_norm, "and of {measured[gradient_growth]:.0f} as measured"),
    (NUMBERS["dimensions"], "digits vary in about {digits:.0f}, a"),
    (NUMBERS["dimensions"], "On noise, in {noise:.0f} dimensions"),
    (noise, "theory has {theory[gradient_growth]:.0f} and"),
    (noise, "and {measured[gradient_growth]:.0f} is measured"),
    (zero, "by a factor of {theory[growth]:.0f}, in theory"),
    (zero, "by a factor of {measured[gradient_growth]:.0f}, in theory"),
    (zero, "mean path has {measured[mean_path_length]:.0f} branches"),
    (scaled, "by {theory[growth]:.1f} in theory and {measured[growth]:.1f} as"),
    (scaled, "ratio of variances is {theory[last_branch_to_skip]:.3f} in every"),
    (divided, "a cosine of {theory[cosine_before]:.2f} before the first block"),
    (divided, "have one of {theory[cosine_behind]:.3f} behind"),
    (divided, "{measured[cosine_before]:.2f} and {measured[cosine_behind]:.3f} are m"),
    (trained, "beyond ±{alpha_last:.2f}, the largest is {alpha_last_max:.2f}"),
    (trained, "median branch has {branch_to_skip_last:.3f} of"),
    (TRAINED["Batch norm"], "against {branch_to_skip_last:.2f} with batch"),
  ):
    # Python writes 1.3e+30 where the page has 1.3e30.
    assert said.format(**numbers).replace("e+", "e") in TEXT


def test_numbers_are_what_theory_predicts():
  images = initial_signals.make_images(concepts.CONFIG)
  for name, numbers in INITIAL.items():
    network = initial_signals.make_model(concepts.CONFIG, methods.get(name))
    signal = theory.predict_model(network, images)
    predicted = concepts.signal_numbers(signal)
    assert predicted == pytest.approx(numbers["theory"], rel=1e-3, abs=1e-12)
