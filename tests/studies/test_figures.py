"""Figures of studies: what they show, read from their axes."""

import itertools
import math

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer

from skipinit_jax.analysis.figures import heat_map_figures
from skipinit_jax.studies import (
  Optimum,
  RateSummary,
  Run,
  SearchResult,
  StudyResults,
  figures,
)

RATES = (2**-5, 2**-4, 2**-3)


def make_search(accuracies, *, deviation=0.01, trains=True, rates=RATES, **fields):
  """A search with a mean accuracy at each rate, None where too few runs completed."""
  summaries = [
    RateSummary(
      rate,
      2,
      0 if accuracy is not None else 2,
      accuracy,
      None if accuracy is None else deviation,
      None if accuracy is None else 1 - accuracy,
      None if accuracy is None else deviation,
    )
    for rate, accuracy in zip(rates, accuracies, strict=True)
  ]
  completed = [each for each in summaries if each.test_accuracy is not None]
  best = max(completed, key=lambda each: each.test_accuracy, default=None)
  fields = {"row": "MLP 2-8", "column": "SkipInit", "labels": {}} | fields
  return SearchResult(
    **fields,
    name=f"{fields['row']}/{fields['column']}",
    best_of=2,
    extends=True,
    rates=summaries,
    optimum=None
    if best is None
    else Optimum(
      "test_accuracy",
      best.test_accuracy,
      deviation,
      best.learning_rate,
      best.learning_rate / 2,
      best.learning_rate,
      rates[0] < best.learning_rate < rates[-1],
    ),
    largest_stable_rate=max(
      (each.learning_rate for each in completed if trains), default=None
    ),
    test_accuracy=None if best is None else best.test_accuracy,
    test_accuracy_deviation=None if best is None else deviation,
    train_loss=None if best is None else best.train_loss,
    train_loss_deviation=None if best is None else deviation,
    trains=trains and best is not None,
    num_runs=2 * len(rates),
    num_diverged=0,
  )


def make_results(searches, runs=()):
  return StudyResults("", "", {}, 0.2, list(searches), list(runs), {}, [])


def network(row, depth, width=8, model="residual_mlp"):
  return {"row": row, "labels": {"model": model, "depth": depth, "width": width}}


def grid(rows, columns):
  """A search of each method for each network; the accuracy tells them apart."""
  return [
    make_search((0.5, 0.6 + 0.01 * i, 0.5), column=f"method {i}", **network(row, i))
    for row in rows
    for i in range(columns)
  ]


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
  assert matplotlib.colors.to_hex(figure.get_facecolor()) == "#ffffff"
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


def bars_of(axes):
  return [patch for patch in axes.patches if patch.get_width() and patch.get_y() == 0]


def test_bars_show_accuracies_and_what_does_not_train():
  results = make_results(
    [
      make_search((0.5, 0.934, 0.5), column="trains", **network("MLP 2-8", 2)),
      make_search((0.1,) * 3, trains=False, column="fails", **network("MLP 2-8", 2)),
      make_search((None,) * 3, column="trains", **network("MLP 4-8", 4)),
    ]
  )
  figure = figures.depth_bars(results)
  (axes,) = figure.axes
  assert_readable(figure)
  assert legend_of(figure) == ["trains", "fails", "does not train"]
  assert [label.get_text() for label in axes.get_xticklabels()] == [
    "MLP 2-8",
    "MLP 4-8",
  ]
  assert texts_of(axes) == ["93", "10", "diverges"]
  heights = [bar.get_height() for bar in bars_of(axes)][:3]
  assert heights == [pytest.approx(93.4), pytest.approx(10), 0]
  assert [bool(bar.get_hatch()) for bar in bars_of(axes)][:3] == [False, True, True]
  # One whisker of a deviation on each side.
  (whisker, _) = [
    each for each in axes.containers if isinstance(each, ErrorbarContainer)
  ]
  (segment,) = whisker.lines[2][0].get_segments()
  assert segment[:, 1] == pytest.approx([92.4, 94.4])


def test_bars_of_networks_that_all_train_have_no_other_legend():
  figure = figures.depth_bars(make_results(grid(["MLP 2-8"], 2)))
  assert legend_of(figure) == ["method 0", "method 1"]


def test_bars_have_a_panel_for_each_kind_of_network_and_wrap():
  kinds = [
    make_search(
      (0.5, 0.9, 0.5), **network(f"{model} {depth}", depth, model=model, width=width)
    )
    for model, width in (("wide_resnet", 2), ("residual_mlp", 8), ("residual_mlp", 9))
    for depth in (16, 100)
  ]
  for each in (3, 4, 5):
    kinds[each] = make_search(
      (0.5, 0.9, 0.5), **(network(f"wide {each}", each, width=9 if each > 3 else 8))
    )
  assert len(figures.depth_bars(make_results(kinds)).axes) == 3
  # 30 bars do not fit side by side.
  figure = figures.depth_bars(
    make_results(grid([f"Wide-ResNet {10**i}-2" for i in range(6)], 5))
  )
  assert_readable(figure)
  rows = [len(axes.get_xticklabels()) for axes in figure.axes]
  assert rows == [3, 3]
  assert sum(len(texts_of(axes)) for axes in figure.axes) == 30


def test_rate_curves_mark_the_best_and_the_failed_rates():
  results = make_results(
    [
      make_search((0.85, 0.95, None), column="peak"),
      make_search((0.1, 0.1, 0.1), column="chance", trains=False),
      make_search((None, None, None), column="diverges"),
    ]
  )
  figure = figures.rate_curves(results)
  (axes,) = figure.axes
  assert_readable(figure)
  assert legend_of(figure) == ["peak", "chance", "diverges"]
  assert axes.get_title() == "MLP 2-8"
  lines = {
    (line.get_marker(), line.get_markersize()): list(line.get_xdata())
    for line in axes.lines
    if len(line.get_xdata())
  }
  crosses = [
    (line.get_xdata()[0], line.get_ydata()[0])
    for line in axes.lines
    if line.get_marker() == "x"
  ]
  # Crosses below all accuracies, at different heights.
  assert [x for x, _ in crosses] == [2**-3, 2**-5]
  assert all(y < 0 for _, y in crosses) and len({y for _, y in crosses}) == 2
  # One circle: networks at chance have no best rate.
  circles = [line for line in axes.lines if line.get_markersize() == 11]
  assert [list(line.get_xdata()) for line in circles] == [[2**-4]]
  assert circles[0].get_ydata()[0] == pytest.approx(95)
  assert lines
  low, high = axes.get_ylim()
  assert low < min(y for _, y in crosses) and high > 100


def test_rate_curves_of_good_networks_use_the_height():
  figure = figures.rate_curves(make_results(grid(["MLP 2-8", "MLP 4-8"], 2)))
  assert {axes.get_ylim()[0] for axes in figure.axes} == {40}
  assert [axes.get_title() for axes in figure.axes] == ["MLP 2-8", "MLP 4-8"]


def test_empty_places_of_panels_are_removed():
  figure = figures.rate_curves(make_results(grid(["a", "b", "c"], 1)))
  assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c"]
  assert_readable(figure)


def make_run(search, rate, seed, accuracies, status="completed"):
  epochs = [float(epoch) for epoch in range(1, len(accuracies) + 1)]
  curve = {"epoch": epochs, "loss": epochs, "accuracy": accuracies}
  return Run(
    search, rate, seed, status, 1, 0.1, 0.9, 0.1, 0.9, {"test": curve}, 1.0, "", {}
  )


def test_learning_curves_are_means_over_completed_seeds_at_the_best_rate():
  search = make_search((0.5, 0.9, 0.5))
  runs = [
    make_run(search.name, 2**-4, 0, [0.2, 0.8]),
    make_run(search.name, 2**-4, 1, [0.4, 1.0]),
    make_run(search.name, 2**-4, 2, [0.1], status="diverged"),
    make_run(search.name, 2**-3, 0, [0.5, 0.5]),
    make_run("another", 2**-4, 0, [0.7, 0.7]),
  ]
  figure = figures.learning_curves(make_results([search], runs))
  (axes,) = figure.axes
  line = axes.lines[0]
  assert list(line.get_xdata()) == [1, 2]
  assert line.get_ydata() == pytest.approx([30, 90])


def test_learning_curves_where_nothing_completes():
  search = make_search((None,) * 3)
  runs = [make_run(search.name, 2**-4, 0, [], status="diverged")]
  (axes,) = figures.learning_curves(make_results([search], runs)).axes
  assert texts_of(axes) == ["no rate completes"]


def at_batch(size, accuracies, budget="epochs", **fields):
  labels = {"batch_size": size, "budget": budget}
  return make_search(accuracies, row=f"batch {size}", labels=labels, **fields)


def test_batch_size_curves():
  searches = [
    # Out of order, and one of another budget.
    at_batch(64, (0.5, 0.9, None), column="SkipInit"),
    at_batch(16, (0.5, 0.8, None), column="SkipInit"),
    at_batch(32, (0.5, 0.7, 0.9), column="SkipInit"),
    at_batch(128, (None, None, None), column="SkipInit"),
    at_batch(32, (0.1, 0.1, 0.1), column="Batch norm", trains=False),
    at_batch(16, (0.5, 0.99, 0.5), column="SkipInit", budget="steps"),
  ]
  figure = figures.batch_size_curves(make_results(searches), "epochs")
  assert_readable(figure)
  accuracy, loss, best, stable = figure.axes
  assert [axes.get_title() for axes in figure.axes] == [
    "test accuracy (%)",
    "training loss",
    "optimal learning rate",
    "largest stable learning rate",
  ]
  assert legend_of(figure) == [
    "SkipInit",
    "Batch norm",
    "proportional to the batch size",
  ]
  (skipinit, batch_norm, *_) = [
    each.lines[0] for each in accuracy.containers if isinstance(each, ErrorbarContainer)
  ]
  assert list(skipinit.get_xdata()) == [16, 32, 64]
  assert skipinit.get_ydata() == pytest.approx([80, 90, 90])
  assert list(batch_norm.get_xdata()) == [32]
  assert loss.containers[0].lines[0].get_ydata() == pytest.approx([0.2, 0.1, 0.1])
  assert loss.get_yscale() == "log"
  optimal = best.containers[0].lines[0]
  assert list(optimal.get_xdata()) == [16, 32, 64]
  assert list(optimal.get_ydata()) == [2**-4, 2**-3, 2**-4]
  # Networks at chance have no optimal rate.
  assert len(best.containers[1].lines[0].get_xdata()) == 0
  # The range: down by a factor of two, not up.
  segment = best.containers[0].lines[2][0].get_segments()[0]
  assert list(segment[:, 1]) == [2**-5, 2**-4]
  # Hollow: at batch size 32 the highest rate is the best and stable.
  for axes in (best, stable):
    (hollow,) = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    assert (list(hollow.get_xdata()), list(hollow.get_ydata())) == ([32], [2**-3])
  (line,) = [line for line in best.lines if line.get_linestyle() == ":"]
  low, *_, high = line.get_ydata()
  assert high / low == pytest.approx(128 / 16)
  ticks = [label.get_text() for label in best.get_xticklabels()]
  assert ticks == ["16", "32", "64", "128"]


def test_batch_size_curves_of_many_sizes_and_methods():
  searches = [
    at_batch(2**i, (0.5, 0.9, 0.7), column=f"SkipInit, α = 1/√{j}")
    for i in range(4, 14)
    for j in range(5)
  ]
  assert_readable(figures.batch_size_curves(make_results(searches), "epochs"))


def test_regularization_curves():
  searches = [
    make_search(
      (0.5, accuracy, 0.5),
      deviation=None,
      row=row,
      column=f"dropout {rate}",
      labels={"dropout_rate": rate},
    )
    for row, accuracies in {
      "SkipInit, α = 0, no biases, no L2": (0.7, 0.8, 0.75),
      "Batch norm, biases": (0.9, None, 0.95),
    }.items()
    for rate, accuracy in zip((0.6, 0.0, 0.2), accuracies, strict=True)
  ]
  searches[4] = make_search(
    (None,) * 3, row="Batch norm, biases", labels={"dropout_rate": 0.0}
  )
  figure = figures.regularization_curves(make_results(searches))
  assert_readable(figure)
  (axes,) = figure.axes
  first, second = (each.lines[0] for each in axes.containers)
  assert list(first.get_xdata()) == [0.0, 0.2, 0.6]
  assert first.get_ydata() == pytest.approx([80, 75, 70])
  # Without the rate at which nothing completed.
  assert list(second.get_xdata()) == [0.2, 0.6]
  assert legend_of(figure) == [
    "SkipInit, α = 0, no biases, no L2",
    "Batch norm, biases",
  ]


def test_branch_scale_curves():
  row = "MLP 9-8, SkipInit, constant α"
  labels = {"depth": 9, "learnable": False}
  searches = [
    make_search((0.5, accuracy, 0.5), row=row, labels=labels | {"alpha": alpha})
    for alpha, accuracy in ((1.0, 0.7), (0.0, 0.9))
  ]
  # Between the two: nothing completes.
  searches.append(make_search((None,) * 3, row=row, labels=labels | {"alpha": 0.25}))
  reference = {"depth": 9, "alpha": None, "learnable": None}
  searches.append(make_search((0.5, 0.8, 0.5), column="Batch norm", labels=reference))
  figure = figures.branch_scale_curves(make_results(searches))
  assert_readable(figure)
  accuracy, best = figure.axes
  assert [label.get_text() for label in accuracy.get_xticklabels()] == [
    "0",
    "$2^{-2}$",
    "1",
  ]
  (curve,) = (each.lines[0] for each in accuracy.containers)
  assert list(curve.get_xdata()) == [0, 2]
  assert curve.get_ydata() == pytest.approx([90, 70])
  (crosses,) = (line for line in accuracy.lines if line.get_marker() == "x")
  assert list(crosses.get_xdata()) == [1]
  (level,) = (line for line in accuracy.lines if line.get_label() == "Batch norm")
  assert level.get_ydata() == pytest.approx([80, 80])
  (rates,) = (each.lines[0] for each in best.containers)
  assert list(rates.get_ydata()) == [2**-4, 2**-4]
  assert legend_of(figure) == ["Batch norm", "SkipInit, constant α"]


DRAW = {
  "depth_bars": figures.depth_bars,
  "rate_curves": figures.rate_curves,
  "learning_curves": figures.learning_curves,
  "batch_size_curves": lambda results: figures.batch_size_curves(results, "epochs"),
  "regularization_curves": figures.regularization_curves,
  "branch_scale_curves": figures.branch_scale_curves,
}
LABELS = {
  "model": "residual_mlp",
  "width": 8,
  "depth": 2,
  "batch_size": 16,
  "budget": "epochs",
  "dropout_rate": 0.0,
  "alpha": 0.5,
}


@pytest.mark.parametrize("draw", DRAW)
@pytest.mark.parametrize(
  ("accuracies", "fields"),
  [
    # One seed; a single rate; everything diverged; one rate at chance.
    ((0.5, 0.9, 0.7), {"deviation": None}),
    ((0.9,), {"deviation": None, "rates": (2**-4,)}),
    ((None,) * 3, {}),
    ((0.1,), {"rates": (0.3,), "trains": False}),
  ],
)
def test_a_single_search_is_enough(draw, accuracies, fields):
  search = make_search(accuracies, labels=LABELS, **fields)
  runs = [
    make_run(search.name, rate.learning_rate, 0, [0.5, 0.9])
    for rate in search.rates
    if rate.test_accuracy is not None
  ]
  figure = DRAW[draw](make_results([search], runs))
  assert_readable(figure)
  assert figure.axes
  assert all(
    map(math.isfinite, [*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim()])
  )


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
  assert_readable(figure)
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
    assert_readable(figure)
    alpha, _, gradient = maps_of(figure)
    assert {(each.norm.vmin, each.norm.vmax) for each in alpha} == {(-2.0, 2.0)}
    for each in gradient:
      assert isinstance(each.norm, matplotlib.colors.LogNorm)
      assert (each.norm.vmin, each.norm.vmax) == pytest.approx((1.0, 1e6))


def test_heat_maps_leave_out_zeros_and_what_is_not_finite():
  values = np.array([[0.0, 1.0, 2.0, np.nan], [4.0, np.inf, 8.0, 1.0]])
  signal = make_signal(2, gradient_rms=values, alpha=values)
  (figure,) = heat_map_figures({"one": signal})
  assert_readable(figure)
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
  assert_readable(figure)
  for (drawn,) in maps_of(figure):
    assert drawn.norm.vmin < drawn.norm.vmax


def test_no_heat_maps_of_nothing():
  assert heat_map_figures({}) == []
  assert heat_map_figures({"one": "not logged", "two": "no rate completes"}) == []


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
  assert legend_of(figure) == ["training set, as trained on", "test set"]
  loss, accuracy = figure.axes
  # Below a decade, a logarithmic axis has hardly a readable number.
  assert loss.get_yscale() == ("log" if epochs == 30 else "linear")
  assert [list(line.get_ydata()) for line in loss.lines] == [
    curve["loss"],
    late["loss"],
  ]
  assert list(accuracy.lines[1].get_ydata()) == [50]


def test_curves_of_a_run_that_diverged_at_once():
  empty = {"epoch": [], "loss": [], "accuracy": []}
  nan = {"epoch": [0.1], "loss": [math.nan], "accuracy": [0.1]}
  figure = figures.run_curves({"train": nan, "test": empty})
  assert_readable(figure)
