"""Latest-N and best-N against a plain statement of the rule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from exitax import checkpoint
from exitax.checkpoint.retention import rank_by_metric, steps_to_keep


def test_the_documented_example() -> None:
  metrics = {step: {'loss': loss} for step, loss in {10: 3.0, 20: 1.0, 30: 2.0, 40: 4.0}.items()}
  config = checkpoint.CheckpointConfig(keep_latest=1, keep_best=2)
  assert steps_to_keep(metrics, config=config) == {20, 30, 40}


@pytest.mark.parametrize('mode', ['lower', 'higher'])
def test_no_dropped_step_is_newer_or_better_than_a_kept_one(mode: str) -> None:
  rng = np.random.default_rng(0)
  for _ in range(50):
    steps = rng.choice(100, size=rng.integers(1, 12), replace=False).tolist()
    values = {step: float(rng.integers(5)) for step in steps}
    latest, best = int(rng.integers(1, 4)), int(rng.integers(0, 4))
    config = checkpoint.CheckpointConfig(
      keep_latest=latest, keep_best=best, best_metric='m', best_mode=checkpoint.BestMode(mode)
    )
    kept = steps_to_keep({step: {'m': value} for step, value in values.items()}, config=config)
    for step in set(steps) - kept:
      assert sum(other > step for other in steps) >= latest
      better = (
        values[other] < values[step] if mode == 'lower' else values[other] > values[step]
        for other in steps
      )
      equal_and_newer = sum(values[o] == values[step] and o > step for o in steps)
      assert sum(better) + equal_and_newer >= best
    assert len(kept) <= latest + best


def test_steps_without_a_finite_metric_do_not_rank() -> None:
  metrics = {1: {'loss': math.nan}, 2: {}, 3: {'loss': 1.0}, 4: {'loss': -math.inf}}
  assert rank_by_metric(metrics, config=checkpoint.CheckpointConfig()) == [3]


def test_the_newer_of_equals_ranks_first() -> None:
  metrics = {1: {'loss': 1.0}, 2: {'loss': 1.0}}
  assert rank_by_metric(metrics, config=checkpoint.CheckpointConfig()) == [2, 1]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'keep_latest': 0}, 'keep_latest=0'),
    ({'keep_best': -1}, 'keep_best=-1'),
    ({'best_mode': 'most'}, "best_mode='most'.*'lower' or 'higher'"),
  ],
)
def test_impossible_configurations_are_refused(options: dict[str, object], message: str) -> None:
  with pytest.raises(checkpoint.CheckpointError, match=message):
    checkpoint.CheckpointConfig(**options)
