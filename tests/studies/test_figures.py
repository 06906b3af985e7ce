"""Figures of studies: each draws every kind of result, and the values that it shows."""

import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from skipinit_jax.studies import figures
from skipinit_jax.studies.batch_size import BatchSizeLabels, batch_size_curves
from skipinit_jax.studies.branch_scale import BranchScaleLabels, branch_scale_curves
from skipinit_jax.studies.regularization import (
  RegularizationLabels,
  regularization_curves,
)
from skipinit_jax.studies.study import Key
from tests.studies.results import make_result, make_results, make_run


def make(*searches, runs=()):
  return make_results("depth_study", searches, runs)


def run_of(search, rate, seed, accuracies, **fields):
  epochs = [float(epoch) for epoch in range(1, len(accuracies) + 1)]
  curve = {"epoch": epochs, "loss": epochs, "accuracy": accuracies}
  return make_run(Key(search, rate, seed), history={"test": curve}, **fields)


def test_learning_curves_are_means_over_completed_seeds_at_the_best_rate():
  search = make_result()
  runs = [
    run_of(search.name, 2**-4, 0, [0.2, 0.8]),
    run_of(search.name, 2**-4, 1, [0.4, 1.0]),
    run_of(search.name, 2**-4, 2, [0.1], status="diverged"),
    run_of(search.name, 2**-3, 0, [0.5, 0.5]),
    run_of("another", 2**-4, 0, [0.7, 0.7]),
  ]
  (axes,) = figures.learning_curves(make(search, runs=runs)).axes
  line = axes.lines[0]
  assert list(line.get_xdata()) == [1, 2]
  assert line.get_ydata() == pytest.approx([30, 90])


DRAW = {
  "bars": (figures.accuracy_bars, None),
  "rates": (figures.rate_curves, None),
  "epochs": (figures.learning_curves, None),
  "batch_size": (
    lambda results: batch_size_curves(results, "epochs"),
    BatchSizeLabels("skipinit", 16, "epochs"),
  ),
  "regularization": (
    regularization_curves,
    RegularizationLabels("skipinit", True, 0.5, 0.0),
  ),
  "branch_scale": (branch_scale_curves, BranchScaleLabels(2, "skipinit", 0.5, True)),
}


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.parametrize(
  "fields",
  [
    # A single rate of one seed; everything diverged; one rate at chance.
    {"deviation": None, "tried": (2**-4,)},
    {"accuracy": None},
    {"accuracy": 0.1, "tried": (0.3,), "rate": 0.3},
  ],
)
def test_a_single_search_is_enough(name, fields):
  draw, labels = DRAW[name]
  search = make_result(labels, **fields)
  figure = draw(make(search, runs=[run_of(search.name, 2**-4, 0, [0.5, 0.9])]))
  FigureCanvasAgg(figure).draw()
  limits = [*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim()]
  assert all(map(math.isfinite, limits))
