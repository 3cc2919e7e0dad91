"""Speed of a run: tokens per second, model flops utilisation, time left."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from exitax.layers import Precision
from exitax.parallel import measure_matmul_flops, peak_flops


class Throughput:
  """Measures the time between calls of `lap`.

  Args:
    tokens_per_step: positions of a global batch.
    flops_per_step: matrix flops of a step over all devices.
    peak: flop/s that all devices together can do.
  """

  def __init__(self, *, tokens_per_step: int, flops_per_step: int, peak: float) -> None:
    self._tokens = tokens_per_step
    self._flops = flops_per_step
    self._peak = peak
    self._start = time.perf_counter()

  def restart(self) -> None:
    """Leaves out the time since the last lap (compilation, evaluation)."""
    self._start = time.perf_counter()

  def lap(self, num_steps: int) -> dict[str, float]:
    """Metrics of the `num_steps` steps since the last lap or restart."""
    now = time.perf_counter()
    seconds = max(now - self._start, 1e-9) / max(num_steps, 1)
    self._start = now
    return {
      'step_seconds': seconds,
      'tokens_per_second': self._tokens / seconds,
      'mfu': self._flops / seconds / self._peak,
    }


def total_peak_flops(precision: Precision) -> float:
  """Peak flop/s of all devices: the chip's public figure or, on a CPU, a measured matmul."""
  devices = jax.devices()
  known = peak_flops(devices[0])
  if known is not None:
    return known * len(devices)
  # Emulated CPU devices share the cores: the measured rate is that of the whole machine.
  dtype: Any = jnp.bfloat16 if precision is Precision.BFLOAT16 else jnp.float32
  return measure_matmul_flops(dtype) * jax.process_count()
