"""What a run does on its devices."""

import numpy as np
import optax

from skipinit_jax.training import TrainConfig, make_mesh, programs


def test_rates_share_the_program_that_initializes(monkeypatch):
  texts = []

  def make_init(*args, **kwargs):
    init = programs_make_init(*args, **kwargs)
    texts.append(init.lower(np.uint32(0)).as_text())
    return init

  programs_make_init = programs.make_init
  monkeypatch.setattr(programs, "make_init", make_init)
  for rate in (0.5, 2**-9):
    config = TrainConfig(
      model="residual_mlp", depth=2, width=8, learning_rate=rate, batch_size=64
    )
    dataset = config.load_dataset()
    model = config.make_model(dataset.num_classes)
    mesh = make_mesh()
    with programs.make_programs(config, dataset, model, mesh) as made:
      held = optax.tree.get(made.state.opt_state, "learning_rate")
      assert held == np.float32(rate)
      assert held.sharding.is_fully_replicated
      after, _ = made.train_steps(made.state, 1)
      assert optax.tree.get(after.opt_state, "learning_rate") == np.float32(rate)
  assert texts[0] == texts[1]
