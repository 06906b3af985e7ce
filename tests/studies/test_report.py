"""What the reports of all studies share."""

import dataclasses
import html

import pytest

from skipinit_jax import document
from skipinit_jax.studies import (
  BatchSizeStudyConfig,
  BranchScaleStudyConfig,
  DepthStudyConfig,
  RegularizationStudyConfig,
  SearchConfig,
  accuracy_table,
  batch_size_study,
  branch_scale_study,
  depth_study,
  make_report,
  print_accuracy,
  regularization_study,
  write_report,
)
from skipinit_jax.training import TrainConfig
from tests.studies.results import contents_of, run_study, texts

SEARCH = SearchConfig((2**-4, 2**-3), extend=False, num_seeds=2, best_of=2)


def make_study(depths=(16, 100), **search):
  fields = {"learning_rates": (2**-4, 2**-3), "extend": False} | search
  config = DepthStudyConfig(
    methods=("batch_norm", "skipinit", "skipinit_one"),
    wide_resnet_depths=depths,
    wide_resnet=TrainConfig(dataset="cifar10", width=2),
    wide_resnet_search=SearchConfig(**fields),
  )
  return depth_study(config)


def accuracy(labels, rate, seed):
  """Networks whose seeds are 0.4 points apart; deep ones at alpha = 1 diverge."""
  if (labels.method, labels.depth) == ("skipinit_one", 100):
    return None
  mean = {"batch_norm": 0.95, "skipinit": 0.94}.get(labels.method, 0.93)
  return mean - 0.1 * (rate < 2**-3) + 0.004 * (seed - 0.5)


RESULTS = run_study(make_study(num_seeds=2, best_of=2), accuracy)


def test_titles_of_users_are_text_in_every_format(tmp_path):
  name = r"$ & <b> $x_$ | `c` \\\$"
  study = make_study(num_seeds=2, best_of=2)
  searches = [
    dataclasses.replace(each, row=name + each.row, column=name + each.column)
    for each in study.searches
  ]
  study = dataclasses.replace(study, searches=tuple(searches))
  results = run_study(study, accuracy)
  page, *_ = write_report(results, tmp_path, ("md", "png", "tex", "pdf"))
  assert html.escape(name + "Batch norm") in page.read_text()


@pytest.mark.parametrize(
  ("search", "entry", "note"),
  [
    # Two seeds 0.4 points apart: 0.4 / sqrt(2) is 0.28.
    ({"num_seeds": 2, "best_of": 2}, "95.0±0.3, 2⁻³", "over the best 2 of 2 seeds"),
    ({"num_seeds": 1, "best_of": 1}, "94.8, 2⁻³", "One seed at each rate. The rates"),
    ({"num_seeds": 3, "best_of": 1}, "95.6, 2⁻³", "The best of 3 seeds at each rate."),
    (
      {"num_seeds": 1, "best_of": 1, "extend": True, "max_learning_rate": 2**-3},
      "94.8, 2⁻³*",
      "* The best rate is the lowest or highest that was allowed",
    ),
  ],
)
def test_accuracy_table(search, entry, note):
  table = accuracy_table(run_study(make_study(**search), accuracy))
  assert texts(table)[0][1] == entry
  assert note in table.note
  assert texts(table)[1][3].startswith("does not train (diverges)")


def test_all_runs():
  report = make_report(RESULTS)
  assert report.command == "python -m experiments.depth_study --x=y"
  assert (report.versions, report.device) == ({"jax": "0.10.2"}, "1 x cpu")
  contents = contents_of(report)
  network = ["Wide-ResNet 100-2", "SkipInit, α = 1"]
  every = texts(contents["all_rates"])
  for rate in ("2⁻⁴", "2⁻³"):
    assert [*network, rate, "2", "2", "none", "none"] in every
  trains = ["Wide-ResNet 16-2", "Batch norm", "2⁻³", "2", "0", "95.0±0.3", "0.5500"]
  assert trains in every
  assert len(every) == 12
  # Each run takes 90 seconds.
  text = report.sections[-1].text
  assert text == "24 runs, of which 4 diverged, took 36.0 minutes in all."


STUDIES = {
  "depth": lambda: make_study(depths=(16,), num_seeds=2, best_of=2),
  "batch_size": lambda: batch_size_study(
    BatchSizeStudyConfig(
      methods=("batch_norm", "skipinit"),
      batch_sizes=(16, 32),
      ghost_batch_size=None,
      train=TrainConfig(batch_size=16, epochs=2, constant_epochs=1),
      search=SEARCH,
    )
  ),
  "regularization": lambda: regularization_study(
    RegularizationStudyConfig(dropout_rates=(0.0, 0.5), search=SEARCH)
  ),
  "branch_scale": lambda: branch_scale_study(
    BranchScaleStudyConfig(
      depths=(3,),
      alphas=(0.0, 2**-0.5),
      learnable=(True, False),
      references=("batch_norm_divide_by_sqrt2",),
      search=SEARCH,
    )
  ),
}


# Two seeds of 80 and 81 % at the higher rate: a deviation of 0.7.
GOOD = "80.5±0.7, 2⁻³"


@pytest.mark.parametrize(
  ("kind", "title", "header", "rows", "figure"),
  [
    (
      "depth",
      "Depth study on CIFAR-10",
      ["Batch norm", "SkipInit, α = 0", "SkipInit, α = 1"],
      {"Wide-ResNet 16-2": [GOOD] * 3},
      "accuracy_by_depth",
    ),
    (
      "batch_size",
      "Batch-size study on scikit-learn's 8x8 digits",
      ["Batch norm", "SkipInit, α = 0"],
      # Rates are in proportion to the batch size: 2⁻³ and 2⁻².
      {
        "batch 16, same epochs": [GOOD] * 2,
        "batch 32, same steps": ["80.5±0.7, 2⁻² (2⁻³ to 2⁻²)"] * 2,
      },
      "batch_size_same_steps",
    ),
    (
      "regularization",
      "Regularization study on scikit-learn's 8x8 digits",
      ["no dropout", "dropout 0.5"],
      {
        "SkipInit, α = 0, biases": [GOOD] * 2,
        "SkipInit, α = 0, no biases, no L2": [GOOD] * 2,
      },
      "accuracy_by_dropout",
    ),
    (
      "branch_scale",
      "Branch-scale study on scikit-learn's 8x8 digits",
      ["α = 0", "α = 0.707", "Batch norm, divide by √2"],
      {
        "MLP 3-64, Batch norm, learnable α": [GOOD, GOOD, ""],
        "MLP 3-64, as it is": ["", "", GOOD],
      },
      "accuracy_by_alpha",
    ),
  ],
)
def test_report_of_each_kind(kind, title, header, rows, figure):
  results = run_study(
    STUDIES[kind](), lambda labels, rate, seed: 0.8 + 0.01 * seed - 0.1 * (rate < 2**-3)
  )
  report = make_report(results)
  assert report.title == title
  assert figure in contents_of(report)
  table = accuracy_table(results)
  assert list(table.header[1:]) == header
  entries = {name: others for name, *others in texts(table) if name in rows}
  assert entries == rows


@pytest.mark.parametrize("value", [None, 0.1])
@pytest.mark.parametrize("kind", STUDIES)
def test_a_study_in_which_nothing_trained(kind, value, capsys):
  results = run_study(STUDIES[kind](), lambda labels, rate, seed: value)
  count = len(results.runs)
  diverged = count if value is None else 0
  sentence = f"No trial trained: of {count} runs {diverged} diverged, and at no rate"
  report = make_report(results)
  assert report.lead.startswith(sentence)
  assert not any(finding.holds for finding in report.findings)
  words = "does not train (diverges)" if value is None else "does not train (10.0±0.0"
  assert words in document.markdown(accuracy_table(results))
  print_accuracy(results)
  assert sentence in capsys.readouterr().out


def test_signals_of_a_study():
  def signal(labels):
    if (labels.depth, labels.method) == (16, "batch_norm"):
      return None
    alpha = {"alpha": ["0 0", "0.1 -0.1"]} if labels.method == "skipinit" else {}
    measured = {"branch_to_skip": ["0 1", "2 3"], "gradient_rms": ["1 1", "2 nan"]}
    return {"step": [0, 10], "block": [1, 2]} | alpha | measured

  study = make_study(num_seeds=2, best_of=2)
  contents = contents_of(make_report(run_study(study, accuracy, signal)))
  first, second = (item for name, item in contents.items() if "signal" in name)
  assert second.title == "Signal by block and step, Wide-ResNet 100-2"
  # The uppermost panels show alpha; the last one's runs diverged.
  for item, words in (
    (first, ["not logged", None, "no learnable α"]),
    (second, ["no learnable α", None, "no rate\ncompletes"]),
  ):
    panels = [each for each in item.figure.axes if each.get_label() != "<colorbar>"]
    texts = [panel.texts[0].get_text() if panel.texts else None for panel in panels]
    assert texts[:3] == words
  # Without a signal there is no such section.
  assert not any("signal" in name for name in contents_of(make_report(RESULTS)))
