"""How a peer of `benchmarks.side_by_side` answers."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(make_step: Callable[..., Callable[[], Any]]) -> None:
  """Takes steps as standard input asks for them, and prints their seconds.

  Args:
    make_step: called with the fields of `side_by_side.Case` and the peer's options;
      returns a function that takes one step and waits until it is done.
  """
  # Libraries print too; standard output is for answers alone.
  answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

  def answer(value: Any) -> None:
    print(json.dumps(value), file=answers, flush=True)

  step = make_step(**json.loads(sys.argv[1]))
  step()
  answer("first step")
  for line in sys.stdin:
    seconds = []
    for _ in range(int(line)):
      begin = time.perf_counter()
      step()
      seconds.append(time.perf_counter() - begin)
    answer(seconds)
  unit = 1 if sys.platform == "darwin" else 1024
  answer(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
