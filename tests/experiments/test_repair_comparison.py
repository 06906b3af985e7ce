"""LSUV's unit variances, and the comparison's runs and table."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from experiments import repair_comparison
from skipinit_jax import methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResidualMLP
from skipinit_jax.studies import SearchConfig


def test_lsuv_makes_every_variance_one():
  """Against outputs computed by hand, layer by layer."""
  x = np.random.default_rng(0).normal(size=(64, 12)).astype(np.float32)
  model = ResidualMLP(3, 24, 10, methods.get("unnormalized"), layers_per_block=2)
  init = jax.jit(functools.partial(model.init, train=True))
  params = repair_comparison.lsuv(model, init(jax.random.key(0), x), x)["params"]
  blocks = params["stack"]["blocks"]
  y = x @ params["stem"]["kernel"]
  variances = [y.var()]
  for index in range(3):
    branch = y
    for name in ("dense1", "dense2"):
      kernel = blocks[name]["kernel"][index]
      # A multiple of an orthonormal matrix.
      product = kernel @ kernel.T
      np.testing.assert_allclose(product, np.eye(24) * product[0, 0], atol=1e-4)
      branch = np.maximum(branch, 0) @ kernel
      variances.append(branch.var())
    y = y + branch
  logits = nn.relu(y) @ params["head"]["classifier"]["kernel"]
  np.testing.assert_allclose([*variances, logits.var()], 1, atol=0.1)


def config(**changes):
  small = repair_comparison.RepairConfig(
    ways=("as it is", "repaired"),
    residual_mlp_datasets=("digits",),
    wide_resnet_datasets=(),
  )
  train = dataclasses.replace(small.residual_mlp, depth=24, width=24, epochs=2)
  search = SearchConfig((2**-8,), extend=False, num_seeds=1, best_of=1)
  return dataclasses.replace(
    small, residual_mlp=train, residual_mlp_search=search, **changes
  )


def test_a_comparison_goes_on_and_makes_its_table(tmp_path, capsys):
  path = tmp_path / "repair.json"
  repair_comparison.compare(config(ways=("as it is",)), path)
  results = repair_comparison.compare(config(), path)
  done = capsys.readouterr().out.splitlines()
  assert [run["way"] for run in results["runs"]] == ["as it is", "repaired"]
  assert len(done) == 2
  assert repair_comparison.compare(config(), path)["runs"] == results["runs"]
  assert not capsys.readouterr().out
  ((network, as_it_is, repaired),) = (
    row.values() for row in results["tables"]["accuracy"]
  )
  assert network == "MLP 24-24, scikit-learn's 8x8 digits"
  assert as_it_is.startswith(("diverges", "does not train"))
  assert float(repaired.split(",")[0]) > 30


@pytest.mark.parametrize(
  ("field", "words"),
  [("residual_mlp_datasets", "Unknown dataset 'none'"), ("ways", "Unknown way 'none'")],
)
def test_unknown_names(field, words, tmp_path):
  with pytest.raises(UsageError, match=words):
    repair_comparison.compare(config(**{field: ("none",)}), tmp_path / "repair.json")
