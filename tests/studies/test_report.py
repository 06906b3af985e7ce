"""Reports: from a study's results to tables that say what they are."""

import json
import math

import pytest

from skipinit_jax import document
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import (
  BatchSizeStudyConfig,
  BranchScaleStudyConfig,
  DepthStudyConfig,
  RegularizationStudyConfig,
  Run,
  SearchConfig,
  batch_size_study,
  branch_scale_study,
  depth_study,
  make_report,
  print_accuracy,
  regularization_study,
  write_report,
)
from skipinit_jax.studies.report import accuracy_table, published_table
from skipinit_jax.studies.study import missing_runs, summarize
from skipinit_jax.training import TrainConfig

THRESHOLD = 0.15


def run_study(study, accuracy, signal=lambda labels: None):
  """Results of a study whose runs have the accuracies of a function; None diverges.

  Their histories have the signals of another one, unless those are None.
  """
  runs = {}
  while missing := missing_runs(study, runs, THRESHOLD):
    for search, key in missing:
      value = accuracy(search.labels, key.learning_rate, key.seed)
      diverged = value is None
      curve = {"epoch": [1.0, 2.0], "loss": [1.0, 0.5], "accuracy": [0.1, value]}
      runs[key] = Run(
        **key._asdict(),
        status="diverged" if diverged else "completed",
        step=10,
        train_loss=math.nan if diverged else 1.5 - value,
        train_accuracy=math.nan if diverged else value,
        test_loss=None if diverged else 1.0,
        test_accuracy=value,
        history={"train": curve, "test": curve}
        | ({"signal": logged} if (logged := signal(search.labels)) else {}),
        seconds=90.0,
        device="1 x cpu",
        versions={"jax": "0.10.2"},
      )
  return summarize(study, runs, THRESHOLD, "python -m experiments.depth_study --x=y")


def depth_config(**changes):
  search = SearchConfig(
    learning_rates=(2**-3, 2**-2),
    min_learning_rate=2**-4,
    max_learning_rate=2**-1,
    num_seeds=2,
    best_of=2,
  )
  fields = {
    "methods": ("batch_norm", "skipinit", "skipinit_one", "divide_by_sqrt2"),
    "wide_resnet_depths": (16, 100),
    "wide_resnet": TrainConfig(dataset="cifar10", width=2),
    "wide_resnet_search": search,
  }
  return DepthStudyConfig(**(fields | changes))


def depth_accuracy(labels, rate, seed):
  """The crafted networks of the table below."""
  method, depth = labels["method"], labels["depth"]
  if depth == 100 and method == "skipinit_one":
    return None
  if depth == 100 and method == "divide_by_sqrt2":
    return 0.1
  # Best at 2^-3 or 2^-1, and 2 points worse at the neighbours; seeds 0.4 points apart.
  mean = {"batch_norm": 0.95, "skipinit": 0.94}.get(method, 0.93)
  distance = abs(math.log2(rate) + (1 if method == "divide_by_sqrt2" else 3))
  if method == "skipinit_one":
    # A point worse, where the seeds are 3 points apart.
    return mean - 0.01 * distance + 0.03 * (seed - 0.5)
  return mean - 0.02 * distance + 0.004 * (seed - 0.5)


DEPTH = run_study(depth_study(depth_config()), depth_accuracy)

# Deviations of two seeds 0.4 points apart: 0.4 / sqrt(2) = 0.28; 3 points apart: 2.12.
DEPTH_MARKDOWN = """\
| network | Batch norm | SkipInit, α = 0 | SkipInit, α = 1 | Divide by √2 |
| --- | --- | --- | --- | --- |
| Wide-ResNet 16-2 | 95.0±0.3, 2^-3 | 94.0±0.3, 2^-3 | 93.0±2.1, 2^-3 (2^-4 to 2^-2) \
| 93.0±0.3, 2^-1\\* |
| Wide-ResNet 100-2 | 95.0±0.3, 2^-3 | 94.0±0.3, 2^-3 | does not train (diverges) \
| does not train (10.0±0.0, 2^-1) |
"""


def tables_of(report):
  contents = (item for section in report.sections for item in section.contents)
  return {item.name: item for item in contents if isinstance(item, document.Table)}


def texts(table):
  """The rows of a table as texts."""
  return [
    [entry if isinstance(entry, str) else entry.text for entry in row]
    for row in table.rows
  ]


def test_accuracy_table_in_markdown():
  table = accuracy_table(DEPTH)
  assert document.markdown(table) == DEPTH_MARKDOWN
  assert table.note == (
    "Mean ± standard deviation over the best 2 of 2 seeds at each rate; in "
    "parentheses the rates whose mean lies within one deviation of the best. The rates "
    "are searched by factors of two until the best one is inside. * The best rate is "
    "the lowest or highest that was allowed: a better one may lie beyond."
  )


def test_one_seed_has_no_deviation():
  search = SearchConfig((0.25, 0.125), extend=False, num_seeds=1, best_of=1)
  study = depth_study(depth_config(wide_resnet_search=search))
  results = run_study(study, depth_accuracy)
  report = make_report(results)
  for table in tables_of(report).values():
    entries = [text for row in texts(table)[:2] for text in row[:3]]
    assert not any("±" in text for text in entries)
  table = accuracy_table(results)
  assert texts(table)[0][:3] == ["Wide-ResNet 16-2", "94.8, 2^-3", "93.8, 2^-3"]
  # A fixed grid has no star: its note says what it means.
  assert "*" not in document.markdown(table)
  assert table.note == (
    "One seed at each rate. The rates are fixed; a better one may lie between or "
    "beyond them."
  )
  gap = next(each for each in report.findings if "0.5 percentage points" in each.claim)
  assert (gap.holds, gap.evidence) == (
    None,
    "Wide-ResNet 16-2: -1.0; Wide-ResNet 100-2: -1.0 points.",
  )


def test_best_one_of_three_seeds():
  search = SearchConfig((0.25, 0.125), extend=False, num_seeds=3, best_of=1)
  study = depth_study(depth_config(wide_resnet_search=search))
  table = accuracy_table(run_study(study, depth_accuracy))
  assert texts(table)[0][1] == "95.6, 2^-3"
  assert table.note.startswith("The best of 3 seeds at each rate. ")


def published_of(config, accuracy):
  table = published_table(run_study(depth_study(config), accuracy))
  return {tuple(row[:2]): row[2:] for row in texts(table)}


def published_accuracy(labels, rate, seed):
  """The published means, but for SkipInit's at depth 16: one point less."""
  table = {
    ("batch_norm", 16): 0.935,
    ("skipinit", 16): 0.923,
    ("skipinit_one", 16): 0.93,
    ("divide_by_sqrt2", 16): None,
    ("batch_norm", 100): 0.947,
    ("skipinit", 100): 0.942,
    ("skipinit_one", 100): None,
    ("divide_by_sqrt2", 100): 0.889,
  }
  value = table[labels["method"], labels["depth"]]
  return None if value is None else value + 0.002 * seed - 0.01 * (rate != 2**-3)


def test_published_numbers_of_the_same_networks():
  rows = published_of(depth_config(), published_accuracy)
  assert rows["Wide-ResNet 16-2", "Batch norm"] == [
    "93.6±0.1, 2^-3",
    "93.5±0.1, 2^-1",
    # Deviations of 0.14 and 0.1.
    "agrees: +0.1±0.2",
  ]
  assert rows["Wide-ResNet 16-2", "SkipInit, α = 0"] == [
    "92.4±0.1, 2^-3",
    "93.3±0.1, 2^-2",
    "differs: -0.9±0.2",
  ]
  assert rows["Wide-ResNet 16-2", "Divide by √2"] == [
    "does not train (diverges)",
    "92.4±0.1, 2^-2 (2^-2 to 2^-1)",
    "differs: does not train here",
  ]
  assert rows["Wide-ResNet 100-2", "SkipInit, α = 1"] == [
    "does not train (diverges)",
    "does not train",
    "neither trains",
  ]
  assert len(rows) == 8


def test_published_numbers_of_one_seed_are_not_judged():
  search = SearchConfig((0.25, 0.125), extend=False, num_seeds=1, best_of=1)
  rows = published_of(depth_config(wide_resnet_search=search), published_accuracy)
  assert rows["Wide-ResNet 16-2", "SkipInit, α = 0"][2] == "both train, -1.0"


@pytest.mark.parametrize(
  ("changes", "network"),
  [
    ({"wide_resnet": TrainConfig(width=2)}, "Wide-ResNet 16-2"),
    ({"wide_resnet": TrainConfig(dataset="cifar10", width=4)}, "Wide-ResNet 16-4"),
    (
      {
        "wide_resnet_depths": (),
        "residual_mlp_depths": (16, 100),
        "residual_mlp_search": depth_config().wide_resnet_search,
      },
      "MLP 16-64",
    ),
  ],
)
def test_elsewhere_only_what_trains_is_compared(changes, network):
  rows = published_of(depth_config(**changes), published_accuracy)
  assert rows[network, "SkipInit, α = 0"][2] == "both train"
  assert rows[network, "Divide by √2"][2] == "differs: does not train here"
  other = network.replace("16", "100")
  assert rows[other, "SkipInit, α = 1"][2] == "neither trains"


def test_networks_without_l2_are_compared_with_those_without():
  config = depth_config(
    methods=("skipinit",), methods_without_l2=("skipinit",), wide_resnet_depths=(16,)
  )
  rows = published_of(config, published_accuracy)
  assert rows["Wide-ResNet 16-2", "SkipInit, α = 0"][1].startswith("93.3±0.1")
  assert rows["Wide-ResNet 16-2", "SkipInit, α = 0, no L2"][1].startswith("89.8±0.2")


def test_where_nothing_is_published_there_is_no_comparison():
  study = depth_study(depth_config(wide_resnet_depths=(10,)))
  results = run_study(study, depth_accuracy)
  assert published_table(results) is None
  assert "published" not in tables_of(make_report(results))


def test_report_of_a_depth_study():
  report = make_report(DEPTH)
  assert report.title == "Depth study on CIFAR-10"
  assert report.command == "python -m experiments.depth_study --x=y"
  assert (report.versions, report.device) == ({"jax": "0.10.2"}, "1 x cpu")
  assert report.config["wide_resnet"]["width"] == 2
  tables = tables_of(report)
  assert texts(tables["difference"]) == [
    # The root of twice 0.28 squared is 0.4.
    ["Wide-ResNet 16-2", "-1.0±0.4", "-2.0±2.1", "-2.0±0.4"],
    ["Wide-ResNet 100-2", "-1.0±0.4", "does not train", "does not train"],
  ]
  diverged = texts(tables["diverged"])
  assert ["Wide-ResNet 100-2", "SkipInit, α = 1", "2^-3", "2 of 2"] in diverged
  assert {row[1] for row in diverged} == {"SkipInit, α = 1"}
  every = texts(tables["all_rates"])
  assert ["Wide-ResNet 100-2", "SkipInit, α = 1", "2^-3", "2", "none", "none"] in every
  assert ["Wide-ResNet 16-2", "Batch norm", "2^-3", "2", "95.0±0.3", "0.5500"] in every
  assert len(every) == sum(len(search.rates) for search in DEPTH.searches)
  (section,) = [each for each in report.sections if each.title == "All runs"]
  num_diverged = sum(run.status == "diverged" for run in DEPTH.runs)
  assert section.text == (
    f"{len(DEPTH.runs)} runs, of which {num_diverged} diverged, took "
    f"{len(DEPTH.runs) * 1.5 / 60:.1f} hours in all."
  )


def test_files_of_a_report(tmp_path):
  page, *others = write_report(DEPTH, tmp_path / "report")
  assert page.name == "report.html"
  tables = {"accuracy", "published", "difference", "all_rates", "diverged"}
  figures = {"accuracy_by_depth", "rate_curves", "learning_curves"}
  expected = {f"{name}.md" for name in tables} | {f"{name}.png" for name in figures}
  assert {path.name for path in others} == expected | {"results.json"}
  assert DEPTH_MARKDOWN in (page.parent / "accuracy.md").read_text()
  results = json.loads((page.parent / "results.json").read_text())
  assert len(results["runs"]) == len(DEPTH.runs)


def batch_results(accuracy):
  config = BatchSizeStudyConfig(
    methods=("batch_norm", "skipinit"),
    batch_sizes=(16, 32),
    ghost_batch_size=None,
    train=TrainConfig(batch_size=16, epochs=2, constant_epochs=1),
    search=SearchConfig(
      learning_rates=(2**-5, 2**-4),
      until_unstable=True,
      min_learning_rate=2**-6,
      max_learning_rate=2**-1,
      num_seeds=2,
      best_of=2,
    ),
  )
  return run_study(batch_size_study(config), accuracy)


def test_report_of_a_batch_size_study():
  def accuracy(labels, rate, seed):
    limit = {"batch_norm": 2**9, "skipinit": 2**-3}[labels["method"]]
    best = 2**-8 * labels["batch_size"]
    if rate > limit:
      return None
    return 0.9 - 0.05 * abs(math.log2(rate / best)) + 0.001 * seed

  results = batch_results(accuracy)
  report = make_report(results)
  assert report.title == "Batch-size study on scikit-learn's 8x8 digits"
  assert report.lead.startswith("Wide-ResNet 16-1 on scikit-learn's 8x8 digits: ")
  table = accuracy_table(results)
  assert table.header[0] == "batch size"
  assert [row[0] for row in texts(table)] == [
    f"batch {size}, same {budget}"
    for budget in ("epochs", "steps")
    for size in (16, 32)
  ]
  rates = texts(tables_of(report)["rates"])
  assert rates[:4] == [
    # Batch norm is stable at the highest rate allowed: in proportion, 2^-1 and 2^0.
    ["batch 16, same epochs", "Batch norm", "2^-4", "2^-4", "≥ 2^-1", "0.5995"],
    ["batch 16, same epochs", "SkipInit, α = 0", "2^-4", "2^-4", "2^-3", "0.5995"],
    ["batch 32, same epochs", "Batch norm", "2^-3", "2^-3", "≥ 2^0", "0.5995"],
    ["batch 32, same epochs", "SkipInit, α = 0", "2^-3", "2^-3", "2^-3", "0.5995"],
  ]
  figures = [item.name for section in report.sections for item in section.contents]
  assert "batch_size_same_epochs" in figures and "batch_size_same_steps" in figures


def regularization_results(accuracy):
  config = RegularizationStudyConfig(
    methods=("skipinit",),
    dropout_rates=(0.0, 0.5),
    search=SearchConfig((0.25, 0.125), extend=False, num_seeds=1, best_of=1),
  )
  return run_study(regularization_study(config), accuracy)


def test_report_of_a_regularization_study():
  results = regularization_results(
    lambda labels, rate, seed: 0.8 + 0.1 * labels["use_bias"] + rate / 10
  )
  report = make_report(results)
  assert report.title == "Regularization study on scikit-learn's 8x8 digits"
  assert document.markdown(accuracy_table(results)) == (
    "| method | no dropout | dropout 0.5 |\n"
    "| --- | --- | --- |\n"
    "| SkipInit, α = 0, no biases | 82.5, 2^-2 | 82.5, 2^-2 |\n"
    "| SkipInit, α = 0, biases | 92.5, 2^-2 | 92.5, 2^-2 |\n"
    "| SkipInit, α = 0, no biases, no L2 | 82.5, 2^-2 | 82.5, 2^-2 |\n"
    "| SkipInit, α = 0, biases, no L2 | 92.5, 2^-2 | 92.5, 2^-2 |\n"
  )
  assert list(tables_of(report)["all_rates"].header[:2]) == ["method", "dropout"]


def branch_scale_results(accuracy):
  config = BranchScaleStudyConfig(
    alphas=(0.0, 1.0),
    learnable=(True, False),
    references=("batch_norm_divide_by_sqrt2",),
    depths=(3,),
    search=SearchConfig((0.25, 0.125), extend=False, num_seeds=1, best_of=1),
  )
  return run_study(branch_scale_study(config), accuracy)


def test_report_of_a_branch_scale_study():
  results = branch_scale_results(
    lambda labels, rate, seed: 0.5 + 0.3 * (labels["alpha"] or 0.0) + rate / 10
  )
  report = make_report(results)
  assert report.title == "Branch-scale study on scikit-learn's 8x8 digits"
  assert report.lead.startswith("MLPs on scikit-learn's 8x8 digits whose branches")
  assert document.markdown(accuracy_table(results)) == (
    "| network | α = 0 | α = 1 | Batch norm, divide by √2 |\n"
    "| --- | --- | --- | --- |\n"
    "| MLP 3-64, Batch norm, learnable α | 52.5, 2^-2 | 82.5, 2^-2 |  |\n"
    "| MLP 3-64, Batch norm, constant α | 52.5, 2^-2 | 82.5, 2^-2 |  |\n"
    "| MLP 3-64, as it is |  |  | 52.5, 2^-2 |\n"
  )


@pytest.mark.parametrize("value", [None, 0.1])
@pytest.mark.parametrize(
  "kind", ["depth", "batch_size", "regularization", "branch_scale"]
)
def test_a_study_in_which_nothing_trained(kind, value, capsys):
  def accuracy(labels, rate, seed):
    return value

  results = {
    "depth": lambda: run_study(
      depth_study(depth_config(wide_resnet_depths=(16,))), accuracy
    ),
    "batch_size": lambda: batch_results(accuracy),
    "regularization": lambda: regularization_results(accuracy),
    "branch_scale": lambda: branch_scale_results(accuracy),
  }[kind]()
  count = len(results.runs)
  sentence = (
    f"No trial trained: of {count} runs {count if value is None else 0} diverged, and "
    "at no rate was the mean test accuracy above 15.0 %, which is chance and three "
    "standard errors."
  )
  report = make_report(results)
  assert report.lead.startswith(sentence)
  assert not any(finding.holds for finding in report.findings)
  assert "does not train" in document.markdown(accuracy_table(results))
  print_accuracy(results)
  assert sentence in capsys.readouterr().out


def test_terminal_shows_the_table_and_the_findings(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "160")
  print_accuracy(DEPTH)
  printed = capsys.readouterr().out
  assert "95.0±0.3, 2^-3" in printed
  assert "No trial trained" not in printed
  assert "[holds] Batch norm trains at every depth.\n" in printed
  assert "[does not hold] SkipInit, α = 0, is at most 0.5" not in printed
  assert "[cannot tell] SkipInit, α = 0, is at most 0.5 percentage points" in printed
  assert "[cannot tell] Divide by √2 does not train at a depth of 1000" in printed


def test_signals_of_a_study():
  def signal(labels):
    alpha = {"alpha": ["0 0", "0.1 -0.1"]} if labels["method"] == "skipinit" else {}
    measured = {"branch_to_skip": ["0 1", "2 3"], "gradient_rms": ["1 1", "2 nan"]}
    # Nobody asked for the signal of the shallow ones' batch norm.
    if (labels["depth"], labels["method"]) == (16, "batch_norm"):
      return None
    return {"step": [0, 10], "block": [1, 2]} | alpha | measured

  results = run_study(depth_study(depth_config()), depth_accuracy, signal)
  (section,) = [
    section
    for section in make_report(results).sections
    if section.title == "Signal during training"
  ]
  # Four methods are two figures for each network.
  assert [item.name for item in section.contents] == [
    f"signal_{row}_{part}" for row in (1, 2) for part in (1, 2)
  ]
  assert section.contents[3].title == (
    "Signal by block and step, Wide-ResNet 100-2 (2 of 2)"
  )

  def panels(figure):
    return [axes for axes in figure.figure.axes if axes.get_label() != "<colorbar>"]

  def words(figure):
    return [[text.get_text() for text in axes.texts] for axes in panels(figure)[:2]]

  # Their upper panels, of alpha: the methods in the order of the table.
  assert [words(item) for item in section.contents] == [
    [["not logged"], []],
    [["no learnable α"], ["no learnable α"]],
    [["no learnable α"], []],
    # Its runs diverged.
    [["no rate\ncompletes"], ["no learnable α"]],
  ]
  alpha = panels(section.contents[0])[1]
  assert alpha.get_title() == "SkipInit, α = 0"
  assert alpha.collections[0].get_array().tolist() == [[0, 0.1], [0, -0.1]]


def test_no_signal_no_section():
  titles = [section.title for section in make_report(DEPTH).sections]
  assert "Signal during training" not in titles


def test_results_of_another_kind_of_study():
  results = run_study(depth_study(depth_config(methods=("skipinit",))), depth_accuracy)
  object.__setattr__(results, "name", "width_study")
  with pytest.raises(UsageError, match="Unknown kind of study 'width_study'"):
    make_report(results)
