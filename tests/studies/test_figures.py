"""Figures that studies share: what they show, read from their axes."""

import itertools
import math

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer

from skipinit_jax.studies import Run, figures
from skipinit_jax.studies.batch_size import BatchSizeLabels, batch_size_curves
from skipinit_jax.studies.branch_scale import BranchScaleLabels, branch_scale_curves
from skipinit_jax.studies.regularization import (
  RegularizationLabels,
  regularization_curves,
)
from tests.studies.results import make_result, make_results


def make(*searches, runs=()):
  return make_results("depth_study", searches, runs)


def legend_of(figure):
  (legend,) = figure.legends
  return [text.get_text() for text in legend.get_texts()]


def texts_of(axes):
  return [text.get_text() for text in axes.texts]


def ticks_of(axis):
  """The labels of an axis that are drawn: those of places inside it."""
  low, high = sorted(axis.get_view_interval())
  places, labels = axis.get_majorticklocs(), axis.get_majorticklabels()
  # An axis that panels share has labels at only one of them.
  ticks = zip(places, labels, strict=True) if labels else ()
  return [label for place, label in ticks if low <= place <= high]


def assert_readable(figure):
  """Draws a figure and checks that its letters are large, inside, and apart."""
  canvas = FigureCanvasAgg(figure)
  canvas.draw()
  assert figure.get_figwidth() <= 6.4
  renderer = canvas.get_renderer()
  texts = [
    text
    for axes in figure.axes
    for text in [
      *axes.texts,
      axes.title,
      axes.xaxis.label,
      axes.yaxis.label,
      *ticks_of(axes.xaxis),
      *ticks_of(axes.yaxis),
    ]
  ]
  texts += [*figure.texts, *(text for each in figure.legends for text in each.texts)]
  texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
  boxes = [text.get_window_extent(renderer) for text in texts]
  page = figure.bbox
  for text, box in zip(texts, boxes, strict=True):
    assert text.get_fontsize() >= 9, text
    assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, f"{text} is cut off"
    assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1, f"{text} is cut off"
  for (text, box), (other, other_box) in itertools.combinations(
    zip(texts, boxes, strict=True), 2
  ):
    # A pixel or two of margins may touch.
    overlap = box.padded(-2).overlaps(other_box.padded(-2))
    assert not overlap, f"{text} is on {other}"


def grid(rows, columns):
  """A search of each method for each network."""
  return [
    make_result(accuracy=0.6 + 0.01 * index, row=row, column=f"method {index}")
    for row in rows
    for index in range(columns)
  ]


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
  rows = [label.get_text() for label in axes.get_xticklabels()]
  assert rows == ["MLP 2-8", "MLP 4-8"]
  assert texts_of(axes) == ["93", "10", "diverges"]
  bars = [patch for patch in axes.patches if patch.get_width()][:3]
  assert [bar.get_height() for bar in bars] == pytest.approx([93.4, 10, 0])
  assert [bool(bar.get_hatch()) for bar in bars] == [False, True, True]
  # One whisker of a deviation on each side.
  (whisker,) = (each for each in axes.containers if isinstance(each, ErrorbarContainer))
  (segment,) = whisker.lines[2][0].get_segments()
  assert segment[:, 1] == pytest.approx([92.4, 94.4])


def test_bars_have_a_panel_for_each_kind_of_network_and_wrap():
  results = make(*grid(["a 1", "a 2", "b 1", "b 2"], 2))
  figure = figures.accuracy_bars(results, lambda search: search.row[0])
  assert legend_of(figure) == ["method 0", "method 1"]
  assert len(figure.axes) == 2
  # 30 bars do not fit side by side.
  figure = figures.accuracy_bars(
    make(*grid([f"Wide-ResNet {10**i}-2" for i in range(6)], 5))
  )
  assert_readable(figure)
  assert [len(axes.get_xticklabels()) for axes in figure.axes] == [3, 3]
  assert sum(len(texts_of(axes)) for axes in figure.axes) == 30


def test_rate_curves_mark_the_best_and_the_failed_rates():
  tried = (2**-5, 2**-4, 2**-3)
  peak = make_result(accuracy=0.95, column="peak", tried=tried)
  peak.rates[-1] = make_result(accuracy=None, tried=(2**-3,)).rates[0]
  figure = figures.rate_curves(
    make(
      peak,
      make_result(accuracy=0.1, column="chance", tried=tried),
      make_result(accuracy=None, column="diverges", tried=tried),
    )
  )
  (axes,) = figure.axes
  assert_readable(figure)
  assert legend_of(figure) == ["peak", "chance", "diverges"]
  crosses = [line for line in axes.lines if line.get_marker() == "x"]
  # Crosses below all accuracies, at different heights.
  assert [list(line.get_xdata()) for line in crosses] == [[2**-3], list(tried)]
  heights = {line.get_ydata()[0] for line in crosses}
  assert len(heights) == 2 and axes.get_ylim()[0] < min(heights) < max(heights) < 0
  # One circle: networks at chance have no best rate.
  (circle,) = (line for line in axes.lines if line.get_markersize() == 11)
  assert (circle.get_xdata()[0], circle.get_ydata()[0]) == (2**-4, pytest.approx(95))


def test_panels_are_rows_and_empty_places_are_removed():
  figure = figures.rate_curves(make(*grid(["a", "b", "c"], 1)))
  assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c"]
  # Good networks use the height.
  assert {axes.get_ylim()[0] for axes in figure.axes} == {60}
  assert_readable(figure)


def make_run(search, rate, seed, accuracies, status="completed"):
  epochs = [float(epoch) for epoch in range(1, len(accuracies) + 1)]
  curve = {"epoch": epochs, "loss": epochs, "accuracy": accuracies}
  return Run(
    search, rate, seed, status, 1, 0.1, 0.9, 0.1, 0.9, {"test": curve}, 1.0, "", {}
  )


def test_learning_curves_are_means_over_completed_seeds_at_the_best_rate():
  search = make_result()
  runs = [
    make_run(search.name, 2**-4, 0, [0.2, 0.8]),
    make_run(search.name, 2**-4, 1, [0.4, 1.0]),
    make_run(search.name, 2**-4, 2, [0.1], status="diverged"),
    make_run(search.name, 2**-3, 0, [0.5, 0.5]),
    make_run("another", 2**-4, 0, [0.7, 0.7]),
  ]
  (axes,) = figures.learning_curves(make(search, runs=runs)).axes
  line = axes.lines[0]
  assert list(line.get_xdata()) == [1, 2]
  assert line.get_ydata() == pytest.approx([30, 90])
  (axes,) = figures.learning_curves(make(make_result(accuracy=None))).axes
  assert texts_of(axes) == ["no rate completes"]


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
  run = make_run(search.name, 2**-4, 0, [0.5, 0.9])
  figure = draw(make(search, runs=[run]))
  assert_readable(figure)
  limits = [*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim()]
  assert all(map(math.isfinite, limits))


def test_many_lines_are_readable():
  searches = [
    make_result(
      BatchSizeLabels("", 2**i, "epochs"), 0.9, column=f"SkipInit, α = 1/√{j}"
    )
    for i in range(4, 14)
    for j in range(5)
  ]
  assert_readable(batch_size_curves(make(*searches), "epochs"))
  searches = [
    make_result(
      BranchScaleLabels(depth, "skipinit", 2.0**-exponent, learnable),
      0.9,
      row=f"MLP {depth}-8, SkipInit, {learnable}",
    )
    for depth in (16, 1000)
    for learnable in (True, False)
    for exponent in range(7)
  ]
  assert_readable(branch_scale_curves(make(*searches)))


@pytest.mark.parametrize("epochs", [1, 30])
def test_curves_of_a_run(epochs):
  curve = {
    "epoch": [float(epoch + 1) for epoch in range(epochs)],
    "loss": [2.0 / (epoch + 1) for epoch in range(epochs)],
    "accuracy": [0.5] * epochs,
  }
  late = {name: values[-1:] for name, values in curve.items()}
  figure = figures.run_curves({"train": curve, "test": late})
  assert_readable(figure)
  loss, accuracy = figure.axes
  # Below a decade, a logarithmic axis has hardly a readable number.
  assert loss.get_yscale() == ("log" if epochs == 30 else "linear")
  drawn = [list(line.get_ydata()) for line in loss.lines]
  assert drawn == [curve["loss"], late["loss"]]
  assert list(accuracy.lines[1].get_ydata()) == [50]


def test_curves_of_a_run_that_diverged_at_once():
  empty = {"epoch": [], "loss": [], "accuracy": []}
  nan = {"epoch": [0.1], "loss": [math.nan], "accuracy": [0.1]}
  assert_readable(figures.run_curves({"train": nan, "test": empty}))
