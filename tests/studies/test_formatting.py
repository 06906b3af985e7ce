"""How studies write numbers."""

import pytest

from skipinit_jax.studies.formatting import format_accuracy, format_alpha, format_rate


@pytest.mark.parametrize(
  ("rate", "text"),
  [(0.5, "2^-1"), (2.0**-9, "2^-9"), (1, "2^0"), (4.0, "2^2"), (0.3, "0.3")],
)
def test_rates_are_powers_of_two(rate, text):
  assert format_rate(rate) == text


@pytest.mark.parametrize(
  ("alpha", "text"), [(0.0, "0"), (1.0, "1"), (2.0, "2"), (0.25, "2^-2"), (0.3, "0.3")]
)
def test_alpha_is_a_power_of_two_below_one(alpha, text):
  assert format_alpha(alpha) == text


def test_accuracies_are_in_percent():
  assert format_accuracy(0.935, 0.001) == "93.5±0.1"
  assert format_accuracy(0.935, None) == "93.5"
  assert format_accuracy(None, None) == "none"
