# %% [markdown]
# # Run and read a study
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/skipinit_jax/blob/main/colabs/run_a_study.ipynb)
#
# A method that trains at one learning rate and fails at another says little about the
# method. So a *study* of this package searches the learning rate of every cell of its
# table, with several seeds at each rate, and says what was tried. This notebook runs a
# small one, stops it in the middle, goes on, reads the results as a table, as data and
# as figures, and adds a method of your own. It takes a few minutes on two CPU cores.
#
# The first cell installs the package where it is missing.

# %%
import importlib.util
import os

if os.path.exists("../colabs/install.py"):
  os.chdir("..")  # A checkout is here already: this is its folder of notebooks.
elif importlib.util.find_spec("experiments") is None:
  print("Installing skipinit_jax. Warnings about other packages do not matter here.")
  # !test -d checkout || git clone -q https://github.com/OWNER/skipinit_jax checkout
  os.chdir("checkout")
  from colabs import install

  install.main()

# %%
# %matplotlib inline
# %config InlineBackend.figure_format = "retina"
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from IPython.display import Markdown

from skipinit_jax import studies
from skipinit_jax.studies import figures

# %% [markdown]
# ## A study is one command
#
# This one compares three methods in fully connected networks of 16 and of 100 blocks on
# scikit-learn's handwritten digits. In a shell it would be:
#
# ```bash
# python -m experiments.depth_study --workdir=runs/notebook \
#   --config.methods="('batch_norm', 'skipinit', 'skipinit_one')" \
#   --config.wide_resnet_depths="()" --config.residual_mlp_depths="(16, 100)" \
#   --config.residual_mlp.epochs=4 --config.residual_mlp.constant_epochs=3 ...
# ```
#
# Every field of the study, of its training runs and of its search is such a flag;
# `python -m experiments.depth_study --help` lists them. The search below begins with
# two rates and goes on by factors of two, within bounds, until the best rate has a
# lower and a higher neighbor. At each rate it trains two seeds.

# %%
workdir = Path("runs/notebook")
shutil.rmtree(workdir, ignore_errors=True)  # Without this line, an earlier one goes on.

flags = [
  f"--workdir={workdir}",
  "--workers=1",  # So small a study would wait longer for two processes to start.
  "--config.wide_resnet_depths=()",
  "--config.residual_mlp_depths=(16, 100)",
  "--config.residual_mlp.width=32",
  "--config.residual_mlp.epochs=4",
  "--config.residual_mlp.constant_epochs=3",
  "--config.residual_mlp.eval_every_epochs=1",
  "--config.residual_mlp_search.learning_rates=(0.03125, 0.0625)",
  "--config.residual_mlp_search.extend=true",
  "--config.residual_mlp_search.min_learning_rate=0.015625",
  "--config.residual_mlp_search.max_learning_rate=0.125",
  "--config.residual_mlp_search.num_seeds=2",
  "--config.residual_mlp_search.best_of=2",
]
three_methods = ("batch_norm", "skipinit", "skipinit_one")


def run(program, *flags, stop_after=None):
  """Runs `python -m PROGRAM FLAGS...` and prints its lines as they come.

  Args:
    program: such as experiments.depth_study.
    *flags: its flags.
    stop_after: after how many finished trials to interrupt it; None: never.

  Returns:
    Its exit status and its lines.
  """
  command = [sys.executable, "-m", program, *flags]
  lines = []
  with subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=os.environ | {"FORCE_COLOR": ""},  # Jupyter forces colors on its programs.
  ) as process:
    for line in process.stdout:
      print(line, end="")
      lines.append(line)
      # A finished trial's line begins with the state of the study, in brackets.
      if sum(line.startswith("[") for line in lines) == stop_after:
        process.send_signal(signal.SIGINT)  # what Ctrl-C sends
        stop_after = None
  return process.returncode, lines


# %% [markdown]
# ## Stop it, and go on
#
# Stop a study whenever you like, or let the machine be taken away: the same command
# goes on. Here it is interrupted after three trials.

# %%
command = ["experiments.depth_study", *flags, f"--config.methods={three_methods}"]
stopped, _ = run(*command, stop_after=3)

# %% [markdown]
# Finished trials are kept, and one that was running was saved in the middle. The same
# command again makes what is missing. The line of a trial says how far the study is,
# the network, the rate and the seed, the test accuracy, and the best so far.

# %%
status, continued = run(*command)

# %% [markdown]
# ## Read the table
#
# The command has printed it; it is also in the workdir, with everything else, as
# `results.json`. `studies` reads that back.

# %%
results = studies.read_results(workdir)
Markdown(studies.markdown(studies.accuracy_table(results)))

# %% [markdown]
# A cell holds the mean test accuracy in % over the best two seeds at the best rate, its
# deviation, and that rate. In parentheses stands the range of all rates whose accuracy
# is within one deviation of the best: a wide range means that the choice of the rate
# does not matter much. A \* says that the best rate lies at the edge of the allowed
# ones, so that a better one may lie outside. A network that no rate brings above chance
# "does not train", and diverged runs are counted:

# %%
for search in results.searches:
  print(
    f"{search.row}, {search.column}: "
    f"{'trains' if search.trains else 'does not train'}, "
    f"{search.num_diverged} of {search.num_runs} runs diverged"
  )

# %% [markdown]
# With SkipInit's $\alpha$ at 0 the deep network trains, as it does with batch
# normalization. With $\alpha$ at 1 no rate trains it.
#
# ## What is behind a cell
#
# Each cell has its own search, with the statistics of every rate that was tried. A rate
# at which fewer than two runs came to an end has no mean.

# %%
cell = next(
  search
  for search in results.searches
  if search.labels.depth == 100 and search.labels.method == "skipinit"
)
for rate in cell.rates:
  mean = "unknown" if rate.test_accuracy is None else f"{rate.test_accuracy:.1%}"
  print(
    f"rate {rate.learning_rate}: {rate.num_runs} runs, {rate.num_diverged} diverged, "
    f"mean accuracy {mean}"
  )

# %% [markdown]
# The same for all cells as a figure: accuracy by learning rate, with a circle around
# the best and a cross where runs diverged. A best rate is credible where the curve
# falls on both sides of it.

# %%
figures.rate_curves(results)

# %% [markdown]
# And the learning curves at the best rates, which tell whether more epochs might change
# the order. What diverged at every rate has none.

# %%
figures.learning_curves(results)

# %% [markdown]
# ## The report
#
# The last lines of the study's output said which of the paper's claims hold here (four
# epochs of small networks decide little between two methods that both train), and where
# the report is: one HTML page that works offline, with every table and figure as files
# beside it. It can be made again anywhere, also from `results.json` alone: in a shell
# by `python -m experiments.report --workdir=runs/notebook --output=FOLDER`, in Python
# by

# %%
page, *files = studies.write_report(results, "runs/notebook_report")
print(page.name, "and", *(path.name for path in files))

# %% [markdown]
# ## A method of your own
#
# A method is data: a `Method` with other values is a new one. For all programs to know
# it by its name, it is registered in a module, and that module is what you run in the
# place of `experiments.depth_study`. This one starts each branch at a tenth of its
# size.

# %%
my_program = """\
import dataclasses

from experiments import depth_study, program
from skipinit_jax import methods

skipinit = methods.get("skipinit")
methods.register(
  dataclasses.replace(
    skipinit, name="small_alpha", title="SkipInit, α = 0.1", alpha=0.1
  )
)
if __name__ == "__main__":
  program.run(depth_study.main)
"""
module = Path("runs/small_alpha.py")
module.write_text(my_program)
print(f"python -m {module.parent}.{module.stem} now is the depth study with it.")

# %% [markdown]
# A study may grow: the same workdir, one method more, and only the new runs are made.

# %%
before = len(results.runs)
four_methods = (*three_methods, "small_alpha")
status, lines = run("runs.small_alpha", *flags, f"--config.methods={four_methods}")

# %%
grown = studies.read_results(workdir)
print(f"{before} runs before, {len(grown.runs)} now")
Markdown(studies.markdown(studies.accuracy_table(grown)))

# %% [markdown]
# ## Where to go from here
#
# - The studies of the paper are [listed with their
#   commands](https://github.com/OWNER/skipinit_jax/blob/main/docs/studies.md).
#   `--config=cifar10` is the published depth study, for GPUs or TPUs.
# - [Several machines share one
#   study](https://github.com/OWNER/skipinit_jax/blob/main/docs/how_to/many_machines.md)
#   through a database, and `--workers` processes share the runs of one machine.
# - A new idea for a layer in the place of SkipInit's scalar is a Flax module:
#   `Method.branch_scale` takes it.
# - [Why a network of 1000 layers
#   trains](https://github.com/OWNER/skipinit_jax/blob/main/colabs/thousand_layers.ipynb),
#   and [SkipInit in your own Flax
#   network](https://github.com/OWNER/skipinit_jax/blob/main/colabs/your_own_network.ipynb).
