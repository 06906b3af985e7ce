"""What figures draw and leave out, read from their axes."""

import math

import numpy as np
import pytest

from skipinit_jax.analysis import figures


def test_line_figure_leaves_out_what_an_axis_lacks():
  x = np.arange(4)
  values = np.array([1.0, 10, 0, np.inf])
  figure = figures.line_figure(
    [
      figures.Panel("logarithmic", {"a": (x, values)}),
      figures.Panel("linear", {"a": (x, values)}, log_y=False),
    ],
    "step",
  )
  logarithmic, linear = (axes.lines[0] for axes in figure.axes)
  np.testing.assert_array_equal(logarithmic.get_ydata(), [1, 10, np.nan, np.nan])
  np.testing.assert_array_equal(linear.get_ydata(), [1, 10, 0, np.nan])
  assert logarithmic.get_color() == linear.get_color()


def make_history(num_steps=3, num_blocks=4, **changes):
  """A signal whose values grow with the step, apart from those given."""
  grid = 10.0 ** np.arange(num_steps)[:, None] * np.ones(num_blocks)
  values = {"alpha": grid / 100 - 0.5, "branch_to_skip": grid, "gradient_rms": grid}
  return {
    "step": np.arange(num_steps) * 5000,
    "block": np.arange(1, num_blocks + 1),
    **{name: each for name, each in (values | changes).items() if each is not None},
  }


def maps_of(figure):
  """The maps of a figure, row by row; None where a panel has only words."""
  panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
  return [axes.collections[0] if axes.collections else None for axes in panels]


def test_heat_maps_have_a_column_for_each_network_and_a_row_for_each_quantity():
  whole, without = make_history(), make_history(alpha=None)
  (figure,) = figures.heat_map_figures({"SkipInit": whole, "BN": without, "x": "none"})
  first, *others = maps_of(figure)
  drawn = [each is not None for each in others]
  assert drawn == [False, False, True, True, False, True, True, False]
  words = [text.get_text() for axes in figure.axes for text in axes.texts]
  assert words == ["no learnable α", "none", "none", "none"]
  # Blocks go up, steps to the right; each value has a cell around its place.
  np.testing.assert_allclose(first.get_array(), whole["alpha"].T)
  corners = first.get_coordinates()
  assert corners[0, :, 0].tolist() == [-2500, 2500, 7500, 12500]
  assert corners[:, 0, 1].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_heat_maps_of_a_constant(value):
  """A thousand blocks measured once, of which nothing differs."""
  constant = np.full((1, 1000), value)
  history = make_history(1, 1000, **dict.fromkeys(figures.SIGNAL_QUANTITIES, constant))
  (figure,) = figures.heat_map_figures({"one": history})
  assert all(drawn.norm.vmin < drawn.norm.vmax for drawn in maps_of(figure))
