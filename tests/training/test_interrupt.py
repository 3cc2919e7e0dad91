from __future__ import annotations

import os
import signal
import threading

import pytest

from exitax import parallel
from exitax.training.interrupt import AgreedStop, StopSignal


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_the_second_acts(number):
  acted = []
  before = signal.signal(number, lambda *_: acted.append('usual'))
  try:
    with StopSignal() as stop:
      assert not stop.requested
      os.kill(os.getpid(), number)
      assert stop.requested
      assert acted == []
      os.kill(os.getpid(), number)
      assert acted == ['usual']
    with StopSignal() as stop:
      pass
    os.kill(os.getpid(), number)
    assert acted == ['usual', 'usual']
    assert not stop.requested
  finally:
    signal.signal(number, before)


def test_other_threads_leave_signals_alone():
  before = signal.getsignal(signal.SIGTERM)
  seen = []

  def enter() -> None:
    with StopSignal() as stop:
      seen.append((stop.requested, signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=enter)
  thread.start()
  thread.join()
  assert seen == [(False, before)]


@pytest.mark.parametrize(('processes', 'delay'), [(1, 0), (2, 1)])
def test_a_stop_is_seen_at_once_alone_and_one_step_later_by_several(monkeypatch, processes, delay):
  monkeypatch.setattr('jax.process_count', lambda: processes)
  signal = StopSignal()
  stop = AgreedStop(signal, parallel.make_mesh(parallel.MeshConfig(2, 2, 2)))
  assert [stop.reached() for _ in range(3)] == [False] * 3
  signal.requested = True
  assert [stop.reached() for _ in range(3)] == [False] * delay + [True] * (3 - delay)
