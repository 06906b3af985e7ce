"""The ImageNet study: its runs, claims and published numbers."""

import dataclasses

import pytest

from experiments.imagenet import CONFIGS
from skipinit_jax import methods
from skipinit_jax.studies import imagenet_study, make_report
from skipinit_jax.studies.imagenet import PUBLISHED, imagenet_claims, published_table
from skipinit_jax.studies.study import summarize
from tests.studies.results import make_run, play, texts

CONFIG = CONFIGS["imagenet2012"]()
# Above chance for 1000 classes and 50,000 images: 1/1000 and three standard errors.
THRESHOLD = 0.0014


def test_default_is_the_published_table():
  study = imagenet_study(CONFIG)
  cells = {(each.labels.method, each.labels.batch_size) for each in study.searches}
  assert cells == PUBLISHED.keys() and len(study.searches) == 15
  for search in study.searches:
    config = search.config
    network = (config.dataset, config.model, config.depth)
    assert network == ("imagenet2012", "resnet", 50)
    assert (config.epochs, config.schedule) == (90, "cosine")
    labels = (search.labels.method, search.labels.batch_size)
    assert (config.method, config.batch_size) == labels
    # In proportion to the batch size, from 0.1 at 256.
    assert search.protocol.learning_rates == (0.1 * config.batch_size / 256,)
    # Fixup's own network is post-activation.
    assert config.make_model(5).version == (1 if "fixup" in config.method else 2)
    large = config.batch_size > 256 and config.method == "batch_norm"
    assert config.ghost_batch_size == (256 if large else None)


# arXiv:2002.10444v1, its table on ImageNet: top-1/top-5 accuracy by batch size.
TABLE = """
batch_norm           | 75.0/92.2 | 74.9/92.1 | 74.9/91.9
fixup                | 74.8/91.8 | 74.6/91.7 | 73.0/90.6
skipinit_biases      | 74.9/91.9 | 74.6/91.8 | 70.8/89.2
fixup_dropout        | 75.8/92.5 | 75.6/92.5 | 74.8/91.8
regularized_skipinit | 75.6/92.4 | 75.5/92.5 | 72.7/90.7
"""


def test_every_published_number_is_the_published_one():
  rows = [line.split("|") for line in TABLE.strip().splitlines()]
  assert {
    (name.strip(), size): tuple(map(float, entry.split("/")))
    for name, *entries in rows
    for size, entry in zip((256, 1024, 4096), entries, strict=True)
  } == PUBLISHED
  assert {method for method, _ in PUBLISHED} <= set(methods.NAMES)


def results_of(config, accuracy):
  """Results whose runs have the top-1 accuracies of a function, top-5 0.17 above."""

  def run(search, key):
    top1 = accuracy(search.labels, key.seed)
    return make_run(key, top1, test_top5_accuracy=top1 and top1 + 0.17)

  study = imagenet_study(config)
  return summarize(study, play(study, run), THRESHOLD, "")


def test_measured_stands_beside_published():
  def accuracy(labels, seed):
    if (labels.method, labels.batch_size) == ("fixup", 4096):
      return None
    return 0.76 + seed / 100

  config = dataclasses.replace(CONFIG, num_seeds=2)
  results = results_of(config, accuracy)
  rows = {tuple(row[:2]): row[2:] for row in texts(published_table(results))}
  assert len(rows) == 15
  # Seeds 1 point apart: means of 76.5 and 93.5. A sole number has no deviation.
  assert rows["Batch norm", "256"] == ["76.5/93.5", "75.0/92.2", "+1.5"]
  assert rows["Regularized SkipInit", "4096"] == ["76.5/93.5", "72.7/90.7", "+3.8"]
  assert rows["Fixup", "4096"][0] == "does not train"
  report = make_report(results)
  assert report.title == "Methods and batch sizes on ImageNet"
  assert "ResNet 50 v2" in report.lead


def test_another_setting_is_not_judged():
  train = dataclasses.replace(CONFIG.train, epochs=1, warmup_epochs=0.5)
  config = dataclasses.replace(CONFIG, train=train, batch_sizes=(256, 512))
  rows = texts(published_table(results_of(config, lambda *_: 0.5)))
  assert {(row[1], row[4]) for row in rows} == {("256", "another setting")}


@pytest.mark.parametrize(
  ("gap_small", "gap_large", "verdicts"),
  [
    (0.01, -0.02, [True, True]),
    (-0.01, 0.02, [False, False]),
    (0.0, 0.0, [None, None]),
  ],
)
def test_claims_are_checked_on_the_gaps(gap_small, gap_large, verdicts):
  """Seeds 0.1 points apart, so that a gap of a point is certain and one of 0 is not."""

  def accuracy(labels, seed):
    gap = gap_large if labels.batch_size == 4096 else gap_small
    return 0.75 + gap * (labels.method != "batch_norm") + seed / 1000

  config = dataclasses.replace(
    CONFIG, num_seeds=2, methods=("batch_norm", "regularized_skipinit")
  )
  findings = imagenet_claims(results_of(config, accuracy))
  assert [finding.holds for finding in findings] == verdicts
