"""Signals to stop, as requests."""

import os
import signal
import threading

import pytest

from skipinit_jax.training.stop import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    assert not stop.requested
    os.kill(os.getpid(), number)
    assert stop.requested
    # A second termination is the same request.
    os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(number) is before


def test_second_interrupt_does_not_wait():
  with pytest.raises(KeyboardInterrupt), StopRequest():
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_outside_of_the_main_thread_signals_are_left_alone():
  def use():
    with StopRequest():
      handlers.append(signal.getsignal(signal.SIGTERM))

  handlers: list[object] = []
  thread = threading.Thread(target=use)
  thread.start()
  thread.join()
  assert handlers == [signal.getsignal(signal.SIGTERM)]
