"""A method from outside of the package, in a study with processes of its own."""

import json

# What a user writes. The study's workers import it too, and so know the method.
PROGRAM = """
import dataclasses

from flax import linen as nn

from experiments import depth_study, program
from skipinit_jax import methods


class ChannelScale(nn.Module):
  initial_value: float

  @nn.compact
  def __call__(self, x):
    start = nn.initializers.constant(self.initial_value)
    return x * self.param("scale", start, x.shape[-1:])


mine = {"name": "channel_rezero", "title": "ReZero by channel"}
rezero = methods.get("rezero")
methods.register(dataclasses.replace(rezero, branch_scale=ChannelScale, **mine))
if __name__ == "__main__":
  program.run(depth_study.main)
"""


def test_a_method_of_twenty_lines_is_trained_and_in_the_table(run_program, tmp_path):
  assert sum(bool(line) for line in PROGRAM.splitlines()) < 20
  (tmp_path / "channel_rezero.py").write_text(PROGRAM)
  workdir = tmp_path / "study"
  run_program(
    [
      "channel_rezero",
      f"--workdir={workdir}",
      "--workers=2",
      "--config.methods=('channel_rezero',)",
      "--config.residual_mlp_depths=(4,)",
      "--config.wide_resnet_depths=()",
      "--config.residual_mlp.width=16",
      "--config.residual_mlp.epochs=3",
      "--config.residual_mlp_search.learning_rates=(0.03,)",
    ],
    env={"PYTHONPATH": str(tmp_path)},
    status=0,
  )
  results = json.loads((workdir / "results.json").read_text())
  assert "-m channel_rezero" in results["command"]
  (search,) = results["searches"]
  assert (search["labels"]["method"], search["trains"]) == ("channel_rezero", True)
  header, _, row = (workdir / "accuracy.md").read_text().splitlines()[2:5]
  assert header == "| network | ReZero by channel |"
  accuracy = 100 * results["runs"][0]["test_accuracy"]
  assert row == f"| MLP 4-16 | {accuracy:.1f}, 0.03 |"
  # What a new method has to beat: a network that guesses one of ten digits.
  assert accuracy > 50
