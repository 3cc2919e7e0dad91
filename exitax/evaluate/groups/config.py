"""How much an evaluation of groups measures, as frozen data that is checked when made."""

from __future__ import annotations

import dataclasses

from exitax.data.group_rows import NAMES
from exitax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupEvaluateConfig:
  """What is measured.

  Attributes:
    thinkers: sizes of groups; chain of thought (one thinker) always stands beside them.
    prompts: problems per seed.
    seeds: repetitions with problems and random numbers of their own.
    tokens: of each thinker at most; None takes what the training's slots have room for.
    baselines: whether independent sampling, the group with its cross-mask off and the sweep of lags are
      measured too.
    lags: of the sweep, in steps; 0 (the group itself) and never stand beside them.
    temperature: of sampling.
    top_p: of sampling.
    threshold: tokens exit where their confidence is above it; None runs all layers.
    confidence: the measure.
    texts: how many are written at once.
    resamples: of the bootstrap.
    speed_steps: steps that are timed; 0 leaves times out.
    speed_repeats: how often; times are medians.

  Raises:
    UserError: a value out of range.
  """

  thinkers: tuple[int, ...] = (4, 8)
  prompts: int = 200
  seeds: int = 3
  tokens: int | None = None
  baselines: bool = False
  lags: tuple[int, ...] = (1, 2, 4, 8)
  temperature: float = 1.0
  top_p: float = 1.0
  threshold: float | None = None
  confidence: str = 'max_prob'
  texts: int = 128
  resamples: int = 1000
  speed_steps: int = 24
  speed_repeats: int = 7

  def __post_init__(self) -> None:
    for name in ('thinkers', 'lags'):
      object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
    sizes = self.thinkers
    if not sizes or min(sizes) < 2 or max(sizes) > len(NAMES):
      raise UserError(
        f'thinkers={sizes} must be numbers from 2 to {len(NAMES)}; one thinker is always measured'
      )
    if self.lags and min(self.lags) < 1:
      raise UserError(f'lags={self.lags} must be at least 1: 0 and never are always in the sweep')
    lowest = dict.fromkeys(('prompts', 'seeds', 'texts', 'resamples', 'speed_repeats'), 1)
    for name, least in {**lowest, 'tokens': 1, 'speed_steps': 0}.items():
      value = getattr(self, name)
      if value is not None and value < least:
        raise UserError(f'{name}={value} must be at least {least}')
