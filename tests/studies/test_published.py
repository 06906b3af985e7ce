"""The published table, compared with a copy of it as it was published."""

import re

import pytest

from skipinit_jax import methods
from skipinit_jax.studies.published import DEPTH_TABLE, IMAGENET_TABLE

# arXiv:2002.10444v1, tables 1 and 2.
TABLE = """
| depth | batch norm | SkipInit 1/sqrt(d) | SkipInit 0 | SkipInit 1 | divide by sqrt(2) | SkipInit 0, no L2 |
|---|---|---|---|---|---|---|
| 16 | 93.5±0.1, 2^-1 (2^-1..2^-1) | 93.0±0.1, 2^-2 (2^-2..2^-1) | 93.3±0.1, 2^-2 (2^-2..2^-2) | 93.0±0.1, 2^-2 (2^-2..2^-1) | 92.4±0.1, 2^-2 (2^-2..2^-1) | 89.8±0.2, 2^-3 (2^-3..2^-3) |
| 100 | 94.7±0.1, 2^-1 (2^-2..2^0) | 94.2±0.1, 2^-1 (2^-2..2^-1) | 94.2±0.1, 2^-2 (2^-2..2^-2) | does not train | 88.9±0.4, 2^-5 (2^-5..2^-5) | 91.7±0.2, 2^-2 (2^-2..2^-2) |
| 1000 | 94.6±0.1, 2^-2 (2^-3..2^0) | 94.2±0.0, 2^-1 (2^-2..2^-1) | 94.3±0.2, 2^-2 (2^-3..2^-1) | does not train | does not train | 92.1±0.1, 2^-2 (2^-2..2^-2) |
"""  # noqa: E501

COLUMNS = {
  "batch norm": ("batch_norm", True),
  "SkipInit 1/sqrt(d)": ("skipinit_inverse_sqrt_depth", True),
  "SkipInit 0": ("skipinit", True),
  "SkipInit 1": ("skipinit_one", True),
  "divide by sqrt(2)": ("divide_by_sqrt2", True),
  "SkipInit 0, no L2": ("skipinit", False),
}


def parse():
  header, _, *rows = (
    [entry.strip() for entry in line.strip("|").split("|")]
    for line in TABLE.strip().splitlines()
  )
  assert header[1:] == list(COLUMNS)
  return {
    (int(depth), *COLUMNS[column]): entry
    for depth, *entries in rows
    for column, entry in zip(header[1:], entries, strict=True)
  }


ENTRIES = parse()


def test_table_is_complete_and_names_each_entry_once():
  keys = [(each.depth, each.method, each.l2) for each in DEPTH_TABLE]
  assert sorted(keys) == sorted(ENTRIES)
  assert len(keys) == 18


@pytest.mark.parametrize("published", DEPTH_TABLE)
def test_every_number_is_the_published_one(published):
  entry = ENTRIES[published.depth, published.method, published.l2]
  if entry == "does not train":
    assert published.test_accuracy is None
    assert published.deviation is None
    assert published.learning_rates is None
    return
  numbers = re.fullmatch(
    r"([\d.]+)±([\d.]+), 2\^(-?\d+) \(2\^(-?\d+)\.\.2\^(-?\d+)\)", entry
  )
  accuracy, deviation, *exponents = map(float, numbers.groups())
  assert (published.test_accuracy, published.deviation) == (accuracy, deviation)
  assert published.learning_rates == tuple(2**exponent for exponent in exponents)
  best, low, high = published.learning_rates
  assert low <= best <= high


@pytest.mark.parametrize("published", DEPTH_TABLE)
def test_every_entry_is_of_the_published_network(published):
  network = (published.dataset, published.model, published.width)
  assert network == ("cifar10", "wide_resnet", 2)
  assert published.method in methods.NAMES


# arXiv:2002.10444v1, its table on ImageNet: top-1/top-5 accuracy by batch size.
IMAGENET = """
| method | 256 | 1024 | 4096 |
|---|---|---|---|
| batch normalization | 75.0/92.2 | 74.9/92.1 | 74.9/91.9 |
| Fixup | 74.8/91.8 | 74.6/91.7 | 73.0/90.6 |
| SkipInit + biases | 74.9/91.9 | 74.6/91.8 | 70.8/89.2 |
| Fixup + dropout | 75.8/92.5 | 75.6/92.5 | 74.8/91.8 |
| Regularized SkipInit | 75.6/92.4 | 75.5/92.5 | 72.7/90.7 |
"""
NAMES = {
  "batch normalization": "batch_norm",
  "Fixup": "fixup",
  "SkipInit + biases": "skipinit_biases",
  "Fixup + dropout": "fixup_dropout",
  "Regularized SkipInit": "regularized_skipinit",
}


def test_imagenet_table_is_the_published_one():
  header, _, *rows = (
    [entry.strip() for entry in line.strip("|").split("|")]
    for line in IMAGENET.strip().splitlines()
  )
  expected = {
    (NAMES[name], int(size), *map(float, entry.split("/")))
    for name, *entries in rows
    for size, entry in zip(header[1:], entries, strict=True)
  }
  assert len(IMAGENET_TABLE) == len(expected) == 15
  actual = {(e.method, e.batch_size, e.top1, e.top5) for e in IMAGENET_TABLE}
  assert actual == expected
  assert {each.method for each in IMAGENET_TABLE} <= set(methods.NAMES)
