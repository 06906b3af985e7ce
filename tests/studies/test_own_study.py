"""A study and a method from outside of the package, in one file, by its program."""

import json

# What a user writes. The study's workers import it too, and so know the method.
PROGRAM = '''
"""A study of widths, of a method that scales each channel of a branch."""

import dataclasses

from flax import linen as nn

from experiments import program, study_program
from skipinit_jax import document, methods, studies
from skipinit_jax.studies import claims, figures
from skipinit_jax.training import TrainConfig


class ChannelScale(nn.Module):
  initial_value: float

  @nn.compact
  def __call__(self, x):
    start = nn.initializers.constant(self.initial_value)
    return x * self.param("scale", start, x.shape[-1:])


methods.register(
  dataclasses.replace(
    methods.get("rezero"),
    name="channel_rezero",
    title="ReZero by channel",
    branch_scale=ChannelScale,
  )
)


@dataclasses.dataclass
class WidthStudyConfig:
  """Networks of several widths.

  Attributes:
    methods: names of methods.
    widths: features of the networks.
  """

  methods: tuple[str, ...] = ("skipinit", "channel_rezero")
  widths: tuple[int, ...] = (16, 4)


@dataclasses.dataclass(frozen=True)
class WidthLabels:
  method: str
  width: int


def width_study(config):
  train = TrainConfig(model="residual_mlp", depth=4, epochs=3)
  search = studies.SearchConfig((2**-5,), extend=False, num_seeds=1, best_of=1)
  searches = tuple(
    studies.Search(
      name=f"{method}/{width}",
      row=f"width {width}",
      column=methods.get(method).title,
      labels=WidthLabels(method, width),
      config=dataclasses.replace(train, method=method, width=width),
      protocol=search,
    )
    for width in config.widths
    for method in config.methods
  )
  return studies.Study("width_study", config, searches)


def width_claims(results):
  wide = [each for each in results.searches if each.labels.width >= 16]
  return [claims.trains_claim("Wide networks train.", wide)]


def width_report(results):
  bars = document.Figure(
    "accuracy_by_width", "Accuracy by width", figures.accuracy_bars(results), "Bars."
  )
  return studies.StudyReport("Widths", "Is wider better?", [bars])


header = ("width", "method")
studies.register(
  studies.StudyKind("width_study", WidthLabels, header, width_claims, width_report)
)
main = study_program.StudyProgram(width_study, {"small": WidthStudyConfig}, "small")

if __name__ == "__main__":
  program.run(main)
'''


def test_one_file_gets_its_table_claim_figure_and_page(run_program, tmp_path):
  (tmp_path / "width_study.py").write_text(PROGRAM)
  workdir = tmp_path / "study"
  env = {"PYTHONPATH": str(tmp_path)}
  flags = [f"--workdir={workdir}", "--workers=2", "--config.widths=(16,)"]
  done = run_program(["width_study", *flags], env=env, status=0)
  assert "[holds] Wide networks train." in done.stdout
  results = json.loads((workdir / "results.json").read_text())
  assert "-m width_study" in results["command"]
  labels = [search["labels"] for search in results["searches"]]
  assert labels == [
    {"method": name, "width": 16} for name in ("skipinit", "channel_rezero")
  ]
  header, _, row = (workdir / "accuracy.md").read_text().splitlines()[2:5]
  assert header == "| width | SkipInit, α = 0 | ReZero by channel |"
  accuracies = [f"{100 * run['test_accuracy']:.1f}" for run in results["runs"]]
  assert row == f"| width 16 | {accuracies[0]}, 2⁻⁵ | {accuracies[1]}, 2⁻⁵ |"
  # What a new method has to beat: a network that guesses one of ten digits.
  assert min(map(float, accuracies)) > 50
  assert (workdir / "accuracy_by_width.png").stat().st_size > 0
  page = (workdir / "report.html").read_text()
  assert "Is wider better?" in page and "Wide networks train." in page
