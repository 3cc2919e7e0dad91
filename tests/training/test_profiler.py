from __future__ import annotations

import jax
import pytest

from exitax.training.profiler import ProfilerWindow


@pytest.fixture
def calls(monkeypatch):
  """What is asked of jax's profiler, which itself is tried by a whole run."""
  calls = []
  monkeypatch.setattr(jax.profiler, 'start_trace', lambda path: calls.append(('start', path)))
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append(('stop',)))
  return calls


def _run(window, steps, calls):
  for step in steps:
    window.before(step)
    calls.append(step)
    if window.after(step + 1, ()):
      calls.append('written')
  window.close()


def test_traces_the_window(tmp_path, calls):
  _run(ProfilerWindow(tmp_path, start=1, num_steps=2), range(5), calls)
  started = ('start', str(tmp_path / 'profile'))
  assert calls == [0, started, 1, 2, ('stop',), 'written', 3, 4]


def test_a_run_that_ends_or_begins_within_the_window(tmp_path, calls):
  _run(ProfilerWindow(tmp_path, start=1, num_steps=9), range(2), calls)
  assert calls[1:] == [('start', str(tmp_path / 'profile')), 1, ('stop',)]
  calls.clear()
  _run(ProfilerWindow(tmp_path, start=1, num_steps=3), range(2, 6), calls)
  assert calls == [('start', str(tmp_path / 'profile')), 2, 3, ('stop',), 'written', 4, 5]


def test_no_window_no_trace(tmp_path, calls):
  _run(ProfilerWindow(tmp_path, start=1, num_steps=0), range(3), calls)
  assert calls == [0, 1, 2]
