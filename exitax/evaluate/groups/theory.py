"""What policies of enumeration can reach that choose at random among the items they do not see written."""

from __future__ import annotations

import numpy as np


def independent_coverage(num_items: int, num_thinkers: int, num_tokens: int) -> np.ndarray:
  """Of thinkers who know their own text alone: 1 - (1 - K/L)^N after K = 0 to `num_tokens` items.

  No model does better whose thinkers choose in the same way; those that a name or a slot tells which items are
  their own would, which is why both are drawn at random.
  """
  share = np.minimum(np.arange(num_tokens + 1) / num_items, 1.0)
  return 1 - (1 - share) ** num_thinkers


def ideal_coverage(
  num_items: int, num_thinkers: int, num_tokens: int, *, samples: int = 2000, seed: int = 0
) -> np.ndarray:
  """Of thinkers who know all texts up to the step before; they collide within a step only.

  Args:
    num_items: L.
    num_thinkers: N.
    num_tokens: K, the last of the curve.
    samples: simulated groups.
    seed: of the simulation.

  Returns:
    f64 `[num_tokens + 1]`, the mean.
  """
  rng = np.random.default_rng(seed)
  written = np.zeros((samples, num_items), bool)
  curve = [0.0]
  for _ in range(num_tokens):
    # The highest of a row's random marks are a choice at random; each thinker draws marks of its own.
    marks = rng.random((num_thinkers, samples, num_items)) - written
    chosen = np.argmax(marks, axis=-1)
    for one in chosen:
      written[np.arange(samples), one] = True
    curve.append(float(written.mean()))
  return np.asarray(curve)
