"""What a study is said to take, against a run's known speed and a real one."""

import dataclasses
import types

from skipinit_jax.studies import SearchConfig, plan_table
from skipinit_jax.studies import plan as plan_module
from skipinit_jax.studies.depth import DepthStudyConfig, depth_study
from skipinit_jax.training import TrainConfig

STUDY = depth_study(
  DepthStudyConfig(
    methods=("skipinit", "unnormalized"),
    residual_mlp_depths=(2, 3),
    residual_mlp=TrainConfig(
      model="residual_mlp", width=8, epochs=2, constant_epochs=1
    ),
    residual_mlp_search=SearchConfig(
      learning_rates=(2**-6, 2**-5), num_seeds=3, best_of=2
    ),
  )
)


def test_counts_runs_and_multiplies_seconds(monkeypatch):
  trained = []

  def train(config, workdir, *, show_progress, stop):
    trained.append(config)
    return types.SimpleNamespace(seconds_to_first_step=5.0, images_per_second=100.0)

  monkeypatch.setattr(plan_module, "train", train)
  table = plan_table(STUDY)
  assert [config.depth for config in trained] == [2, 3]
  # 2 epochs of 23 batches of 64, the first step apart, at 100 images/s.
  training = (2 * 23 - 1) * 64 / 100
  hours = 12 * (5 + training) / 3600
  assert [row[1:] for row in table.rows] == [
    ["12", "5.0", "28.8", f"{hours:.2f}"],
    ["12", "5.0", "28.8", f"{hours:.2f}"],
    ["24", "", "", f"{2 * hours:.2f}"],
  ]


def test_a_probe_is_cut_short(monkeypatch):
  monkeypatch.setattr(plan_module, "_PROBE_SECONDS", 0.0)
  (search,) = STUDY.searches[:1]
  config = dataclasses.replace(search.config, epochs=100_000)
  start, training = plan_module._probe(dataclasses.replace(search, config=config))
  assert 0 < start < training
