"""What figures draw, and leave out."""

import numpy as np

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
  logarithmic, linear = figure.axes
  np.testing.assert_array_equal(
    logarithmic.lines[0].get_ydata(), [1, 10, np.nan, np.nan]
  )
  np.testing.assert_array_equal(linear.lines[0].get_ydata(), [1, 10, 0, np.nan])
  assert logarithmic.lines[0].get_color() == linear.lines[0].get_color()
