"""How studies write numbers."""

import math

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def format_accuracy(accuracy: float | None, deviation: float | None) -> str:
  """Returns a share in percent, with its deviation where that is known: 93.5±0.1."""
  if accuracy is None:
    return "none"
  error = "" if deviation is None else f"±{100 * deviation:.1f}"
  return f"{100 * accuracy:.1f}{error}"


def format_rate(rate: float) -> str:
  """Returns a rate as a power of two where it is one: 2⁻⁵."""
  mantissa, exponent = math.frexp(rate)
  return f"2{str(exponent - 1).translate(_RAISED)}" if mantissa == 0.5 else f"{rate:g}"


def format_rates(rate: float, lowest: float, highest: float) -> str:
  """Returns a best rate, with its range where that is wider: 2⁻³ (2⁻⁴ to 2⁻³)."""
  text = format_rate(rate)
  if lowest == highest:
    return text
  return f"{text} ({format_rate(lowest)} to {format_rate(highest)})"


def format_alpha(alpha: float) -> str:
  """Returns alpha as a power of two where it is one below 1, else to three digits."""
  return (
    format_rate(alpha) if math.frexp(alpha)[0] == 0.5 and alpha < 1 else f"{alpha:.3g}"
  )
