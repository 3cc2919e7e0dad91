from __future__ import annotations

import jax
import pytest

from exitax.layers import Precision
from exitax.training import throughput


def test_a_lap_divides_by_its_time(monkeypatch):
  clock = iter([100.0, 103.0, 200.0, 201.0])
  monkeypatch.setattr(throughput.time, 'perf_counter', lambda: next(clock))
  measured = throughput.Throughput(tokens_per_step=60, flops_per_step=30, peak=100.0)
  assert measured.lap(2) == pytest.approx(
    {'step_seconds': 1.5, 'tokens_per_second': 40.0, 'mfu': 0.2}
  )
  measured.restart()
  assert measured.lap(1)['step_seconds'] == pytest.approx(1.0)


def test_peak_is_the_chips_or_measured(monkeypatch):
  monkeypatch.setattr(throughput, 'measure_matmul_flops', lambda dtype: 7.0)
  for precision in Precision:
    assert throughput.total_peak_flops(precision) == 7.0
  monkeypatch.setattr(throughput, 'peak_flops', lambda device: 5.0)
  assert throughput.total_peak_flops(Precision.BFLOAT16) == 5.0 * len(jax.devices())
