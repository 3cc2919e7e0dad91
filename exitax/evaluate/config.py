"""How much an evaluation measures, as frozen data that is checked when made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from exitax.decode import OF_SCORES, Confidence
from exitax.errors import UserError, choose
from exitax.evaluate.thresholds import DEFAULT_THRESHOLDS, check_thresholds


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
  """What is measured.

  Attributes:
    rows: held-out rows to score, spread evenly; None scores all.
    thresholds: in [0, 1], in any order; kept from high to low.
    confidence: measures of confidence (one or several, by name or member); the first is the one
      whose decoding is timed and whose table is printed.
    chunk_length: positions of each row whose logits live at once.
    speed_prompts: held-out prompts to decode at each threshold; 0 leaves times out.
    speed_prompt_tokens: length of each.
    speed_new_tokens: tokens to generate after each.
    speed_repeats: times that everything is measured; times are medians.
    speed_seconds: decoding time after which no further repeat is begun.

  Raises:
    UserError: a value out of range.
  """

  rows: int | None = 512
  thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
  confidence: Confidence | str | Sequence[Confidence | str] = OF_SCORES
  chunk_length: int = 64
  speed_prompts: int = 3
  speed_prompt_tokens: int = 32
  speed_new_tokens: int = 48
  speed_repeats: int = 3
  speed_seconds: float = 90.0

  def __post_init__(self) -> None:
    object.__setattr__(self, 'thresholds', check_thresholds(self.thresholds))
    given = self.confidence
    several = (given,) if isinstance(given, (str, Confidence)) else given
    measures = tuple(choose(Confidence, item, name='EvaluateConfig.confidence') for item in several)
    if not measures or len(set(measures)) < len(measures):
      raise UserError('EvaluateConfig.confidence is empty or repeats a measure: name each once')
    if unsuitable := [item.value for item in measures if item not in OF_SCORES]:
      known = ', '.join(item.value for item in OF_SCORES)
      raise UserError(
        f"EvaluateConfig.confidence={unsuitable[0]} is not a function of one exit's scores: "
        f'tables of thresholds know {known}'
      )
    object.__setattr__(self, 'confidence', measures)
    lowest = {'chunk_length': 1, 'speed_prompts': 0}
    lowest |= dict.fromkeys(('speed_prompt_tokens', 'speed_new_tokens', 'speed_repeats'), 1)
    for name, limit in lowest.items():
      if getattr(self, name) < limit:
        raise UserError(f'EvaluateConfig.{name}={getattr(self, name)} must be at least {limit}')
    if not self.speed_seconds >= 0:
      raise UserError(f'EvaluateConfig.speed_seconds={self.speed_seconds} must be 0 or more')
    if self.rows is not None and self.rows < 1:
      raise UserError(f'EvaluateConfig.rows={self.rows} must be at least 1, or None for all')

  @property
  def measures(self) -> tuple[Confidence, ...]:
    """`confidence` as members, the main one first."""
    return cast(tuple[Confidence, ...], self.confidence)
