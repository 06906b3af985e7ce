"""The storm: what it counts as survived, and what not."""

import pytest

from benchmarks.storm import Ended

SENTENCE = "error: The file x is damaged.\n"


@pytest.mark.parametrize(
  ("ended", "survived"),
  [
    (Ended(0, "Test accuracy"), True),
    (Ended(1, SENTENCE), True),
    (Ended(4, ""), False),
    (Ended(1, ""), False),
    (Ended(1, 2 * SENTENCE), False),
    (Ended(-11, ""), False),
    (Ended(1, f"Traceback (most recent call last):\n{SENTENCE}"), False),
    (Ended(0, "Traceback (most recent call last):"), False),
  ],
)
def test_one_sentence_or_the_end(ended, survived):
  assert (ended.fault([0]) is None) == survived
  assert (ended.fault([0, 4]) is None) == (survived or ended.status == 4)
