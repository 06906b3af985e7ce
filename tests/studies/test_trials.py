"""Trials side by side in processes."""

import multiprocessing
import os
import signal

import pytest

from skipinit_jax.errors import UsageError
from skipinit_jax.studies.trials import Trial, run_trials
from skipinit_jax.training import TrainConfig

CONFIG = TrainConfig(model="residual_mlp", depth=2, width=8, epochs=1, batch_size=736)


@pytest.fixture
def trials(tmp_path):
  return [
    Trial(TrainConfig(**vars(CONFIG) | {"seed": seed}), tmp_path / str(seed))
    for seed in range(3)
  ]


def test_processes_give_the_results_of_one_process(trials, tmp_path):
  order = []
  side_by_side = run_trials(trials, 2, lambda trial, _: order.append(trial))
  assert sorted(trial.config.seed for trial in order) == [0, 1, 2]
  assert [result.config["seed"] for result in side_by_side] == [0, 1, 2]
  again = run_trials(trials, 1, lambda *_: None)
  assert again == side_by_side


def test_error_of_a_trial_is_that_of_the_study(trials):
  trials[1] = Trial(TrainConfig(depth=17), trials[1].workdir)
  with pytest.raises(UsageError, match="depth is 17"):
    run_trials(trials, 2, lambda *_: None)


def test_death_of_a_process_is_one_sentence(trials):
  # The first result makes the reporter kill the other workers, as a full memory does.
  def kill_children(*_):
    for child in multiprocessing.active_children():
      os.kill(child.pid, signal.SIGKILL)

  with pytest.raises(UsageError, match="died: run the same command again"):
    run_trials(trials, 2, kill_children)
  assert len(run_trials(trials, 2, lambda *_: None)) == 3


def test_number_of_workers(trials):
  with pytest.raises(UsageError, match="num_workers is 0"):
    run_trials(trials, 0, lambda *_: None)
