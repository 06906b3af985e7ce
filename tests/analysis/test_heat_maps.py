"""Heat maps of a signal during training: what they show, read from their axes."""

import math

import matplotlib.colors
import numpy as np
import pytest

from skipinit_jax.analysis.figures import heat_map_figures


def texts_of(axes):
  return [text.get_text() for text in axes.texts]


def make_signal(num_steps=3, num_blocks=4, **changes):
  """A signal whose values grow with the step, apart from those given."""
  grid = 10.0 ** np.arange(num_steps)[:, None] * np.ones(num_blocks)
  values = {"alpha": grid / 100 - 0.5, "branch_to_skip": grid, "gradient_rms": grid}
  values |= changes
  return {
    "step": np.arange(num_steps) * 5000,
    "block": np.arange(1, num_blocks + 1),
    **{name: each for name, each in values.items() if each is not None},
  }


def maps_of(figure):
  """The maps of a figure, by its rows and columns; None where a panel has none."""
  panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
  columns = panels[0].get_subplotspec().get_gridspec().ncols
  maps = [axes.collections[0] if axes.collections else None for axes in panels]
  return [maps[start : start + columns] for start in range(0, len(maps), columns)]


def test_heat_maps_have_a_column_for_each_network_and_a_row_for_each_quantity():
  whole, without = make_signal(), make_signal(alpha=None)
  (figure,) = heat_map_figures({"SkipInit": whole, "Batch norm": without, "x": "none"})
  assert [axes.get_title() for axes in figure.axes[:3]] == [
    "SkipInit",
    "Batch norm",
    "x",
  ]
  maps = maps_of(figure)
  assert [[each is not None for each in row] for row in maps] == [
    [True, False, False],
    [True, True, False],
    [True, True, False],
  ]
  panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
  assert texts_of(panels[1]) == ["no learnable α"]
  assert texts_of(panels[2]) == texts_of(panels[8]) == ["none"]
  labels = [axes.get_ylabel() for axes in figure.axes if axes not in panels]
  assert labels == ["α", "branch-to-skip ratio", "gradient (RMS)"]
  # Blocks go up, steps to the right; each value has a cell around its place.
  np.testing.assert_allclose(maps[0][0].get_array(), whole["alpha"].T)
  corners = maps[0][0].get_coordinates()
  assert corners[0, :, 0].tolist() == [-2500, 2500, 7500, 12500]
  assert corners[:, 0, 1].tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]
  # Also a panel without a map has these limits.
  assert panels[8].get_xlim() == (-2500, 12500)
  assert panels[8].get_ylim() == (0.5, 4.5)


def test_heat_maps_of_a_quantity_share_one_scale():
  large = make_signal(gradient_rms=np.full((3, 4), 1e6), alpha=np.full((3, 4), 2.0))
  networks = {f"network {index}": make_signal() for index in range(4)}
  drawn = heat_map_figures(networks | {"large": large})
  assert [len(maps_of(figure)[0]) for figure in drawn] == [3, 2]
  for figure in drawn:
    alpha, _, gradient = maps_of(figure)
    assert {(each.norm.vmin, each.norm.vmax) for each in alpha} == {(-2.0, 2.0)}
    for each in gradient:
      assert isinstance(each.norm, matplotlib.colors.LogNorm)
      assert (each.norm.vmin, each.norm.vmax) == pytest.approx((1.0, 1e6))


def test_heat_maps_leave_out_zeros_and_what_is_not_finite():
  values = np.array([[0.0, 1.0, 2.0, np.nan], [4.0, np.inf, 8.0, 1.0]])
  signal = make_signal(2, gradient_rms=values, alpha=values)
  (figure,) = heat_map_figures({"one": signal})
  (alpha,), _, (gradient,) = maps_of(figure)
  assert gradient.get_array().mask.T.tolist() == [
    [True, False, False, True],
    [False, True, False, False],
  ]
  # A zero is a value of alpha, in the middle of its colors.
  assert alpha.get_array().mask.T.tolist() == [
    [False, False, False, True],
    [False, True, False, False],
  ]
  assert (alpha.norm.vmin, alpha.norm.vmax) == (-8.0, 8.0)


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_heat_maps_of_a_constant(value):
  """A thousand blocks measured once, of which nothing differs."""
  constant = np.full((1, 1000), value)
  signal = make_signal(
    1, 1000, alpha=constant, branch_to_skip=constant, gradient_rms=constant
  )
  (figure,) = heat_map_figures({"one": signal})
  for (drawn,) in maps_of(figure):
    assert drawn.norm.vmin < drawn.norm.vmax


def test_no_heat_maps_of_nothing():
  assert heat_map_figures({}) == []
  assert heat_map_figures({"one": "not logged", "two": "no rate completes"}) == []
