"""The batch that tests of the step share, with or without a pipeline."""

from __future__ import annotations

import numpy as np

from exitax import data

LENGTH, BATCH = 8, 8


def make_batch() -> data.Batch:
  """Eight rows of one or two documents, one of them padded; 32 tokens."""
  rng = np.random.default_rng(0)
  segment_ids = np.ones((BATCH, LENGTH), np.int32)
  positions = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
  segment_ids[::2, 3:], positions[::2, 3:] = 2, np.arange(LENGTH - 3)
  segment_ids[1, 5:], positions[1, 5:] = 0, 0
  # Rows count very different numbers of tokens, so that a mean of means would be another number.
  weights = (segment_ids > 0) * (rng.random((BATCH, LENGTH)) < np.linspace(0.1, 1, BATCH)[:, None])
  tokens, targets = rng.integers(0, 32, (2, BATCH, LENGTH)).astype(np.int32)
  return data.Batch(
    tokens=tokens,
    targets=targets,
    segment_ids=segment_ids,
    positions=positions,
    weights=weights.astype(np.float32),
  )
