"""What tests of the programs of studies share."""

import pytest


@pytest.fixture
def assert_refuses(run_program, tmp_path):
  """Asserts that a study ends with one sentence, before it has written anything."""

  def check(command, flag, message):
    workdir = tmp_path / "study"
    # A list that is named twice holds the values of both flags.
    others = [each for each in command if each.split("=")[0] != flag.split("=")[0]]
    done = run_program([*others, f"--workdir={workdir}", flag], status=1)
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not workdir.exists()

  return check
