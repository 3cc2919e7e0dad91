"""Which checkpoints are kept."""

from __future__ import annotations

import dataclasses
import enum

from exitax.checkpoint.errors import CheckpointError


class BestMode(enum.Enum):
  """Which end of the metric is the good one."""

  LOWER = 'lower'
  HIGHER = 'higher'


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """Retention: the latest `keep_latest` steps and the best `keep_best` steps are kept.

  Attributes:
    keep_latest: number of newest steps to keep, at least 1.
    keep_best: number of steps to keep for their metric, 0 or more.
    best_metric: name of the metric, as passed to `CheckpointManager.save`; steps saved without it
      are never among the best.
    best_mode: whether lower or higher is better; its value ('lower', 'higher') is accepted too.

  Raises:
    CheckpointError: a count is too small or the mode is unknown.
  """

  keep_latest: int = 3
  keep_best: int = 1
  best_metric: str = 'loss'
  best_mode: BestMode = BestMode.LOWER

  def __post_init__(self) -> None:
    if self.keep_latest < 1:
      raise CheckpointError(
        f'keep_latest={self.keep_latest} would leave no checkpoint to resume from: choose 1 or more'
      )
    if self.keep_best < 0:
      raise CheckpointError(f'keep_best={self.keep_best} is negative: choose 0 or more')
    try:
      # Configuration files can only write the value's string.
      object.__setattr__(self, 'best_mode', BestMode(self.best_mode))
    except ValueError:
      raise CheckpointError(
        f"best_mode={self.best_mode!r} is unknown: choose 'lower' or 'higher'"
      ) from None
