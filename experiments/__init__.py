"""The programs: `python -m experiments.NAME --help`."""

import sys

from experiments import start

# What Python names so while it looks for the module of `python -m`.
if sys.argv[:1] == ["-m"]:
  start.open_streams()
  start.end_at_signals()
  start.import_jax()
