"""Fields of dataclasses: their types, who takes them, and what nobody asked for."""

import dataclasses

import pytest

from skipinit_jax import fields, methods
from skipinit_jax.errors import UsageError
from skipinit_jax.models import ResidualMLP, ResNet, WideResNet

SKIPINIT = methods.get("skipinit")


@dataclasses.dataclass
class Inner:
  size: int = 1
  name: str | None = None


@dataclasses.dataclass
class Outer:
  rate: float = 0.5
  sizes: tuple[int, ...] = (1,)
  inner: Inner = dataclasses.field(default_factory=Inner)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: WideResNet(16.0, 1, 10, SKIPINIT), "depth is 16.0: it must be a whole"),
    (lambda: WideResNet(16, True, 10, SKIPINIT), "width is True: it must be a whole"),
    # To Python, 50.0 is in the table of depths.
    (lambda: ResNet(50.0, 10, SKIPINIT), "depth is 50.0: it must be a whole"),
    (lambda: ResidualMLP(2, 8, 10, SKIPINIT, scan=1), "scan is 1: it must be True or"),
    (lambda: fields.check_types(Outer(inner=Inner(2.5))), "inner.size is 2.5: it must"),
    (lambda: fields.check_types(Outer(sizes=(True,))), "sizes is (True,): it must"),
  ],
)
def test_wrong_type_is_one_sentence(make, message):
  with pytest.raises(UsageError) as error:
    make()
  assert message in str(error.value)


def test_call_gives_what_is_taken():
  def part(steps, rate, sizes, own):
    return steps, rate, sizes, own

  assert fields.taken(part) == {"steps", "rate", "sizes", "own"}
  called = fields.call(part, Outer(rate=2.0), 7, own=3, sizes=None)
  assert called == (7, 2.0, None, 3)


def test_unusual_are_the_fields_that_differ_from_the_usual_values():
  config = fields.take_as_usual(Outer(rate=1.0))
  assert [*fields.unusual(config)] == []
  config.inner.size, config.sizes = 3, (2,)
  changed = dict(fields.unusual(config))
  assert changed == {
    "sizes": Outer(1.0, (1,), Inner(3)),
    "inner.size": Outer(1.0, (2,), Inner(1)),
  }
  # Each has the same usual values.
  assert [*dict(fields.unusual(changed["sizes"]))] == ["inner.size"]
  assert [*dict(fields.unusual(Outer(rate=1.0)))] == ["rate"]
