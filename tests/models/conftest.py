from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from exitax.models import ExitLM


@pytest.fixture(scope='session')
def random_params() -> Callable[..., Any]:
  """Makes parameters of a model with every leaf drawn at random, scales and biases too."""

  def make(model: ExitLM, *, seed: int = 0, spread: float = 0.3) -> Any:
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(model.init, jax.random.key(0))

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
      mean = 1.0 if path[-1].key == 'scale' else 0.0
      return (mean + spread * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)

  return make


@pytest.fixture(scope='session')
def packed_batch() -> Callable[..., dict[str, np.ndarray]]:
  """Makes tokens, segment ids and positions of rows that hold documents of the given lengths."""

  def make(*rows: tuple[int, ...], vocab_size: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    length = max(sum(row) for row in rows)
    shape = (len(rows), length)
    batch = {
      'tokens': rng.integers(0, vocab_size, shape).astype(np.int32),
      'segment_ids': np.zeros(shape, np.int32),
      'positions': np.zeros(shape, np.int32),
    }
    for row, lengths in enumerate(rows):
      start = 0
      for number, size in enumerate(lengths, start=1):
        batch['segment_ids'][row, start : start + size] = number
        batch['positions'][row, start : start + size] = np.arange(size)
        start += size
    return batch

  return make
