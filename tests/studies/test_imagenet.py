"""The ImageNet study: its runs, its tables, and trials that run in turn."""

import dataclasses

import pytest

from experiments.configs.imagenet import CONFIGS
from skipinit_jax.errors import UsageError
from skipinit_jax.studies import (
  ImageNetStudyConfig,
  Interrupted,
  imagenet_study,
  make_report,
  read_results,
  run_in_turn,
  write_report,
)
from skipinit_jax.studies import in_turn as in_turn_module
from skipinit_jax.studies.report import published_imagenet_table
from skipinit_jax.studies.study import Key, check, missing_runs, summarize
from skipinit_jax.training import TrainConfig

CONFIG = CONFIGS["imagenet2012"]()
# Above chance for 1000 classes and 50,000 images: 1/1000 and three standard errors.
THRESHOLD = 0.0014


def test_default_is_the_published_table():
  study = imagenet_study(CONFIG)
  check(study)
  cells = {(s.labels["method"], s.labels["batch_size"]) for s in study.searches}
  assert len(study.searches) == len(cells) == 15
  for search in study.searches:
    config = search.config
    assert (config.dataset, config.model, config.depth) == (
      "imagenet2012",
      "resnet",
      50,
    )
    assert (config.epochs, config.schedule) == (90, "cosine")
    assert (config.batch_size, config.method) == (
      search.labels["batch_size"],
      search.labels["method"],
    )
    # In proportion to the batch size, from 0.1 at 256.
    assert search.protocol.learning_rates == (0.1 * config.batch_size / 256,)
    # Fixup's own network is post-activation.
    assert config.version == (1 if "fixup" in config.method else 2)
    large = config.batch_size > 256 and config.method == "batch_norm"
    assert config.ghost_batch_size == (256 if large else None)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"methods": ()}, ["methods is empty"]),
    ({"methods": ("batchnorm",)}, ["batchnorm", "batch_norm"]),
    ({"batch_sizes": (256, 256)}, ["batch_sizes", "twice"]),
    ({"batch_sizes": (0,)}, ["batch_sizes has 0", "at least 1"]),
    ({"num_seeds": 0}, ["num_seeds is 0"]),
    ({"train": TrainConfig(method="fixup")}, ["train.method", "use methods"]),
  ],
)
def test_bad_configurations_are_one_sentence(changes, words):
  with pytest.raises(UsageError) as error:
    imagenet_study(dataclasses.replace(CONFIG, **changes))
  assert all(word in str(error.value) for word in words)


def results_of(config, accuracy, make_run):
  """Results whose runs have the top-1 accuracies of a function, top-5 0.17 above."""
  study = imagenet_study(config)
  runs = {}
  for search, key in missing_runs(study, runs, THRESHOLD):
    top1 = accuracy(search.labels, key.seed)
    top5 = None if top1 is None else top1 + 0.17
    fields = {"test_accuracy": top1, "test_top5_accuracy": top5}
    if top1 is None:
      fields["status"] = "diverged"
    runs[key] = make_run(key, **fields)
  return summarize(study, runs, THRESHOLD, "python -m experiments.imagenet")


def texts(row):
  return [entry if isinstance(entry, str) else entry.text for entry in row]


def test_measured_stands_beside_published(make_run):
  def accuracy(labels, seed):
    if labels["method"] == "fixup" and labels["batch_size"] == 4096:
      return None
    return 0.76 + seed / 100

  config = dataclasses.replace(CONFIG, num_seeds=2)
  results = results_of(config, accuracy, make_run)
  rows = {
    tuple(texts(r)[:2]): texts(r)[2:] for r in published_imagenet_table(results).rows
  }
  assert len(rows) == 15
  # Seeds 1 point apart: means of 76.5 and 93.5. A sole number has no deviation.
  assert rows["Batch norm", "256"] == ["76.5/93.5", "75.0/92.2", "+1.5"]
  assert rows["Regularized SkipInit", "4096"] == ["76.5/93.5", "72.7/90.7", "+3.8"]
  assert rows["Fixup", "4096"][0] == "does not train"
  report = make_report(results)
  assert report.title == "Methods and batch sizes on ImageNet"
  assert "ResNet 50 v2" in report.lead


def test_another_setting_is_not_judged(make_run):
  train = dataclasses.replace(CONFIG.train, epochs=1, warmup_epochs=0.5)
  config = dataclasses.replace(CONFIG, train=train, batch_sizes=(256, 512))
  table = published_imagenet_table(results_of(config, lambda *_: 0.5, make_run))
  assert {texts(row)[1] for row in table.rows} == {"256"}
  assert {texts(row)[4] for row in table.rows} == {"another setting"}


@pytest.mark.parametrize(
  ("gap_small", "gap_large", "verdicts"),
  [
    (0.01, -0.02, [True, True]),
    (-0.01, 0.02, [False, False]),
    (0.0, 0.0, [None, None]),
  ],
)
def test_claims_are_checked_on_the_gaps(gap_small, gap_large, verdicts, make_run):
  """Seeds 0.1 points apart, so that a gap of a point is certain and one of 0 is not."""

  def accuracy(labels, seed):
    gap = gap_large if labels["batch_size"] == 4096 else gap_small
    return 0.75 + gap * (labels["method"] != "batch_norm") + seed / 1000

  config = dataclasses.replace(
    CONFIG, num_seeds=2, methods=("batch_norm", "regularized_skipinit")
  )
  report = make_report(results_of(config, accuracy, make_run))
  assert [finding.holds for finding in report.findings] == verdicts


TINY = ImageNetStudyConfig(
  methods=("batch_norm", "skipinit"),
  batch_sizes=(32, 64),
  ghost_batch_size=None,
  train=TrainConfig(
    model="residual_mlp", depth=2, width=8, batch_size=32, epochs=1, learning_rate=0.01
  ),
)


def test_runs_in_turn_stop_and_go_on(tmp_path, monkeypatch, capsys):
  train = in_turn_module.train
  calls = []

  def interrupted(config, workdir):
    calls.append(config)
    if len(calls) == 2:
      return dataclasses.replace(train(config, tmp_path / "x"), status="interrupted")
    return train(config, workdir)

  study = imagenet_study(TINY)
  monkeypatch.setattr(in_turn_module, "train", interrupted)
  with pytest.raises(Interrupted):
    run_in_turn(study, tmp_path / "study")
  assert len(calls) == 2
  monkeypatch.setattr(in_turn_module, "train", train)
  results = run_in_turn(study, tmp_path / "study")
  assert [search.name for search in results.searches] == [
    "batch_norm/batch_32",
    "batch_norm/batch_64",
    "skipinit/batch_32",
    "skipinit/batch_64",
  ]
  for search, run in zip(results.searches, results.runs, strict=True):
    config = calls[0]
    assert run.search == search.name and run.status == "completed"
    # 1472 images make 46 batches of 32, and 23 of 64.
    assert run.step == 1472 // search.labels["batch_size"]
    assert run.learning_rate == 0.01 * search.labels["batch_size"] / 32
    assert run.test_accuracy <= run.test_top5_accuracy <= 1
    assert run.history["test"]["epoch"] == [1.0]
    assert config.batch_size == 32
  printed = capsys.readouterr().out
  assert "Run 4 of 4: SkipInit, α = 0, batch 64, seed 0" in printed
  # What is finished is not trained again, and the report is made from it.
  monkeypatch.setattr("skipinit_jax.training.loop.Trainer", None)
  again = run_in_turn(study, tmp_path / "study")
  assert again == results
  write_report(again, tmp_path / "report")
  assert read_results(tmp_path / "report") == again


def test_all_cells_are_checked_before_the_first_is_trained(tmp_path):
  config = dataclasses.replace(TINY, batch_sizes=(32, 36))
  with pytest.raises(UsageError, match=r"batch 36: batch_size is 36.*8 devices"):
    run_in_turn(imagenet_study(config), tmp_path)
  assert not list(tmp_path.iterdir())


def test_keys_name_the_directories(tmp_path):
  key = Key("skipinit/batch_32", 0.01, 0)
  expected = tmp_path / "trials/skipinit/batch_32/rate_0.01/seed_0"
  assert in_turn_module.run_dir(tmp_path / "trials", key) == expected
