"""How many cores a process may use."""

import os

from skipinit_jax.cores import num_cores


def test_only_those_that_this_process_may_use(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 5, 7}, raising=False)
  monkeypatch.setattr(os, "cpu_count", lambda: 8)
  assert num_cores() == 3
  # Where the system cannot tell.
  monkeypatch.delattr(os, "sched_getaffinity")
  assert num_cores() == 8
