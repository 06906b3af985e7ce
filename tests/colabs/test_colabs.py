"""The notebooks run from end to end, and what they say is so."""

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest

from colabs import execute

ROOT = Path(__file__).resolve().parent.parent.parent

# By notebook: what its prose says of its outcome, as statements that run behind its
# last cell, in the kernel that holds its variables.
CLAIMS = {
  "thousand_layers": """
import math
end = {name: curve.measured.mean.second_moment[-1] for name, curve in curves.items()}
start = {name: curve.measured.mean.second_moment[0] for name, curve in curves.items()}
growth = {name: end[name] / start[name] for name in curves}
# "some 30 orders of magnitude", m_0, "one unit per block" and "at most e times".
assert 28 < math.log10(growth["unnormalized"]) < 32
assert 0.3 < growth["divide_by_sqrt2"] < 3
assert 0.8 < (end["batch_norm"] - start["batch_norm"]) / 100 < 1.2
assert 2 < growth["skipinit_inverse_sqrt_depth"] < 3.2
variance = curves["unnormalized"].measured.mean.variance
assert variance[-1] / variance[0] > 1e27
# Doubling, from a second moment of about one, ends near the 128th block.
assert 122 < overflow < 136

# "The branch weighs about 1/l of the skip path", and alpha^2 "a little less".
ratio = curves["batch_norm"].measured.mean.branch_to_skip
l = np.arange(20, 101)
assert np.all((0.7 < ratio[19:] * l) & (ratio[19:] * l < 1.4))
ratio = curves["skipinit_inverse_sqrt_depth"].measured.mean.branch_to_skip
assert np.all((0.006 < ratio) & (ratio < 0.011))
lengths = {
  name: theory.mean_path_length(figures.measured_path_weights(curve.measured)[0])
  for name, curve in curves.items()
}
assert abs(lengths["unnormalized"] - 50) < 2
assert abs(lengths["divide_by_sqrt2"] - 50) < 2
assert math.log(100) - 2 < lengths["batch_norm"] < math.log(100) + 1

# Angles: equal without normalization, lost; kept by batch normalization and SkipInit.
cosine = {name: curve.measured.mean.cosine for name, curve in curves.items()}
assert np.allclose(cosine["unnormalized"], cosine["divide_by_sqrt2"], atol=0.02)
assert cosine["divide_by_sqrt2"][-1] > 0.97
assert cosine["batch_norm"][-1] < cosine["batch_norm"][0] < 0.6
two_blocks = cosine["divide_by_sqrt2"][2] - cosine["divide_by_sqrt2"][0]
lost = np.diff(cosine["skipinit_inverse_sqrt_depth"][[0, -1]])[0]
assert 0.5 < lost / two_blocks < 1.5
assert round(18 * math.pi**2 / 1000**2, 4) == 0.0002

# Verdicts and trainings.
kinds = {
  name: {(fault.kind, fault.direction) for fault in diagnosis.faults}
  for name, diagnosis in diagnoses.items()
}
assert kinds["batch_norm"] == kinds["skipinit"] == set()
assert ("loses its inputs", "forward") in kinds["divide_by_sqrt2"]
assert ("vanishes", "forward") in kinds["divide_by_sqrt2"]
assert kinds["skipinit_one"] == {("explodes", "forward")}
assert results["divide_by_sqrt2"].test_accuracy < 0.2
assert abs(results["divide_by_sqrt2"].train_loss - math.log(10)) < 0.05
assert (results["skipinit_one"].status, results["skipinit_one"].step) == ("diverged", 1)

# Answers to the exercises.
assert abs(alpha - 0.267) < 1e-3 and 500 < thousandfold < 2000
assert abs((1 - similarity) / (18 * math.pi**2 / 1000**2) - 1) < 0.1
assert np.allclose(lengths_1000, (6.49, 1), atol=0.01)
assert verdicts == [True, False]
""",
  "your_own_network": """
assert accuracies["Batch norm", 0.05] > 0.85
assert accuracies["SkipInit, α = 0", 0.05] > 0.75
assert max(accuracies["Unnormalized", rate] for rate in (0.05, 0.0001)) < 0.25
assert diagnoses["Batch norm"].healthy and diagnoses["SkipInit, α = 0"].healthy
(fault,) = diagnoses["Unnormalized"].faults
assert (fault.kind, fault.direction) == ("explodes", "forward")
assert "SkipInit" in diagnoses["Unnormalized"].text
moments = {name: each.signal.second_moment for name, each in diagnoses.items()}
growing = moments["Unnormalized"]
assert 1.3 < (growing[12] / growing[0]) ** (1 / 12) < 1.8
stages = moments["SkipInit, α = 0"]
assert np.allclose(stages[:13], stages[0], rtol=1e-3)
assert np.allclose(stages[13:], stages[13], rtol=1e-3)
assert one_by_one["SkipInit, α = 0"] > 0.75
assert max(one_by_one["Batch norm"], averaged) < one_by_one["SkipInit, α = 0"] - 0.2
# It has learned, as it was trained.
assert max(one_by_one["Batch norm"], averaged) < as_trained - 0.2
# Behind its first steps the network without normalization is at chance.
assert averages["Unnormalized"][0] > 1e3 * averages["Unnormalized"][-1]
# The same in NNX.
assert not analysis.diagnose(in_nnx["Unnormalized"], images[:64]).healthy
assert analysis.diagnose(in_nnx["SkipInit, α = 0"], images[:64]).healthy
""",
  "run_a_study": """
import re
from jax._src import xla_bridge
assert stopped == 4 and status == 0
# What was finished is not made again, and all that was missing is.
kept = re.match(r"(\\d+) trials are done already", continued[0])
assert 3 <= int(kept[1]) < before
trials = [line for line in continued if re.match(r"\\[\\d+ done", line)]
assert len(trials) == before - int(kept[1])
assert lines[0].startswith(f"{before} trials are done already")
assert len(grown.runs) > before
assert "[holds] SkipInit, α = 0 trains at every depth." in "".join(continued)
assert "Report: " in continued[-1]
trains = {
  (each.labels.depth, each.labels.method): each.trains for each in grown.searches
}
for method in ("batch_norm", "skipinit", "small_alpha"):
  assert trains[16, method] and trains[100, method]
assert not trains[100, "skipinit_one"]
assert all(each.extends for each in results.searches)
assert page.exists() and len(files) > 5
# The devices are left to the study: only one process can have a TPU.
assert not xla_bridge.backends_are_initialized()
""",
}


@pytest.fixture(scope="module", params=execute.NOTEBOOKS)
def name(request):
  """The name of each notebook."""
  return request.param


def test_every_notebook_is_tested():
  notebooks = {path.stem for path in execute.FOLDER.glob("*.ipynb")}
  assert notebooks == set(execute.NOTEBOOKS) == set(CLAIMS)


def test_runs_and_its_claims_hold(name, tmp_path, child_environment):
  notebook = execute.read(name)
  text = "\n".join(cell.source for cell in notebook.cells)
  answers = re.findall(r"<details>[^`]*```python\n(.*?)```", text, flags=re.DOTALL)
  assert len(answers) == (4 if name == "thousand_layers" else 0)
  notebook.cells += map(nbformat.v4.new_code_cell, [*answers, CLAIMS[name]])
  execute.execute(notebook, tmp_path, env=child_environment())


def test_committed_notebook_is_executed(name):
  path, notebook = execute.FOLDER / f"{name}.ipynb", execute.read(name)
  assert path.stat().st_size < 400_000
  said, figures = [], 0
  code = [cell for cell in notebook.cells if cell.cell_type == "code"]
  for number, cell in enumerate(code, start=1):
    assert cell.execution_count == number
    for output in cell.outputs:
      assert output.output_type != "error" and output.get("name") != "stderr"
      data = output.get("data", {})
      figures += "image/png" in data
      said += [output.get("text", ""), *(data[key] for key in data if "text" in key)]
  assert figures > 1
  # Neither a path nor a time of the machine that executed it.
  assert not re.search(r"/(tmp|home|root|Users|work)/|\d:\d\d:\d\d", "\n".join(said))


def test_begins_with_title_then_installs(name):
  title, install_cell, *_ = execute.read(name).cells
  assert title.source.startswith("# ")
  # One for all, which the next test runs.
  assert install_cell.source == execute.read(execute.NOTEBOOKS[0]).cells[1].source


@pytest.mark.parametrize("beside", ["nothing", "address", "wheel"])
def test_first_cell_installs_the_package(beside, tmp_path, child_environment):
  """As in a runtime of Colab, which has other packages and not this one."""
  runtime, folder = tmp_path / "runtime", tmp_path / "content"
  folder.mkdir()
  subprocess.run([sys.executable, "-m", "venv", "--without-pip", runtime], check=True)
  environment = child_environment(
    {
      "IPYTHONDIR": str(tmp_path / "ipython"),
      # pip's way to say that builds take the setuptools that is there.
      "PIP_NO_BUILD_ISOLATION": "0",
      "PIP_NO_INDEX": "1",
      # The packages of this Python, pip too, so that nothing is downloaded. What is
      # installed in place, as this package, is not found so.
      "PYTHONPATH": sysconfig.get_path("purelib"),
    }
  )
  cell = execute.read(execute.NOTEBOOKS[0]).cells[1].source
  if beside == "address":
    cell = cell.replace('REPOSITORY = ""', f'REPOSITORY = "{ROOT.as_uri()}"')
  if beside == "wheel":
    # Builds leave files behind.
    project = tmp_path / "project"
    subprocess.run(["git", "clone", "-q", ROOT, project], check=True)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder]
    subprocess.run([*wheel, project], env=environment, check=True)
  program = folder / "cell.ipy"
  program.write_text(
    f"{cell}\nimport experiments, skipinit_jax\n"
    "print(experiments.__file__, skipinit_jax.__file__)\n"
  )
  done = subprocess.run(
    [runtime / "bin/python", "-m", "IPython", program],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
  )
  said = done.stdout + done.stderr
  if beside == "nothing":
    assert "Set REPOSITORY above" in said and "Installing" not in said
    return
  assert done.returncode == 0, said
  (site,) = runtime.glob("lib/*/site-packages")
  package = site / "skipinit_jax"
  files = f"{package}/programs/experiments/__init__.py {package}/__init__.py"
  assert done.stdout.splitlines()[-1] == files
