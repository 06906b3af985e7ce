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


def legend_of(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def texts_of(axes):
  return [text.get_text() for text in axes.texts]


def curve(axes, index=0):
  """The points of a curve with error bars."""
  line = axes.containers[index].lines[0]
  return {x: pytest.approx(y) for x, y in zip(*line.get_data(), strict=True)}


def test_bars_show_accuracies_and_what_does_not_train():
  figure = figures.accuracy_bars(
    make(
      make_result(accuracy=0.934, deviation=0.01, column="trains"),
      make_result(accuracy=0.1, deviation=0, column="fails"),
      make_result(accuracy=None, row="MLP 4-8", column="trains"),
    )
  )
  (axes,) = figure.axes
  assert legend_of(figure) == ["trains", "fails", "does not train"]
  assert texts_of(axes) == ["93", "10", "diverges"]


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


def test_curves_by_batch_size():
  def at_size(size, accuracy, method="skipinit", budget="epochs", **fields):
    labels = BatchSizeLabels(method, size, budget)
    return make_result(labels, accuracy, column=method, **fields)

  searches = [
    # Out of order, and one at another budget.
    at_size(64, 0.9),
    at_size(16, 0.8),
    at_size(32, 0.7, rate=2**-3, tried=(2**-5, 2**-4, 2**-3)),
    at_size(128, None),
    at_size(32, 0.1, "batch_norm"),
    at_size(16, 0.99, budget="steps"),
  ]
  figure = batch_size_curves(make(*searches), "epochs")
  accuracy, loss, best, _ = figure.axes
  assert curve(accuracy) == {16: 80, 32: 70, 64: 90}
  assert curve(accuracy, 1) == {32: 10}
  assert curve(loss) == {16: 0.2, 32: 0.3, 64: 0.1}
  # Networks at chance have no optimal rate.
  assert curve(best) == {16: 2**-4, 32: 2**-3, 64: 2**-4}
  assert curve(best, 1) == {}


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


def test_curves_of_a_run():
  train = {"epoch": [1.0, 2.0], "loss": [2.0, 1.0], "accuracy": [0.4, 0.5]}
  late = {name: values[-1:] for name, values in train.items()}
  loss, accuracy = figures.run_curves({"train": train, "test": late}).axes
  assert [list(line.get_ydata()) for line in loss.lines] == [[2, 1], [1]]
  assert list(accuracy.lines[1].get_ydata()) == [50]
  # One that diverged at once.
  empty = {"epoch": [], "loss": [], "accuracy": []}
  nan = {"epoch": [0.1], "loss": [math.nan], "accuracy": [0.1]}
  FigureCanvasAgg(figures.run_curves({"train": nan, "test": empty})).draw()
