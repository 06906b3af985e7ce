"""A signal to stop, as a request that the work in hand can honour."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class StopRequest:
  """Turns SIGTERM and the first SIGINT into a request to save and stop.

  Python delivers signals to the main thread only: elsewhere it does nothing.

  Attributes:
    requested: whether one of the signals came since the context was entered.
  """

  def __init__(self) -> None:
    self.requested = False
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _: FrameType | None) -> None:
    if self.requested and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.requested = True
