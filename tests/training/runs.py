"""What tests of whole runs share."""

from skipinit_jax.training.metrics import read_metrics


class StopAt:
  """Requests a stop the n-th time that it is asked; stands in for `StopRequest`."""

  def __init__(self, asked):
    self._left = asked

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    pass

  @property
  def requested(self):
    self._left -= 1
    return self._left < 0


def rows_of(workdir):
  """Returns the rows of a run without what no two runs share."""
  return [
    {name: value for name, value in row.items() if name != "images_per_second"}
    for row in read_metrics(workdir)
  ]
