"""Which steps survive, as a pure function of the steps and their metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping

from exitax.checkpoint.config import BestMode, CheckpointConfig


def rank_by_metric(
  metrics_by_step: Mapping[int, Mapping[str, float]], *, config: CheckpointConfig
) -> list[int]:
  """Steps from best to worst by `config.best_metric`; the newer step wins a tie.

  Steps without the metric, or with one that is not finite, are left out.
  """
  sign = 1.0 if config.best_mode is BestMode.LOWER else -1.0
  scored = [
    (sign * metrics[config.best_metric], -step)
    for step, metrics in metrics_by_step.items()
    if math.isfinite(metrics.get(config.best_metric, math.nan))
  ]
  return [-negative_step for _, negative_step in sorted(scored)]


def steps_to_keep(
  metrics_by_step: Mapping[int, Mapping[str, float]], *, config: CheckpointConfig
) -> frozenset[int]:
  """The latest `keep_latest` steps together with the best `keep_best` steps.

  Example: losses {10: 3.0, 20: 1.0, 30: 2.0, 40: 4.0}, keep_latest=1, keep_best=2 -> {20, 30, 40}.
  """
  latest = sorted(metrics_by_step)[-config.keep_latest :]
  best = rank_by_metric(metrics_by_step, config=config)[: config.keep_best]
  return frozenset(latest) | frozenset(best)
