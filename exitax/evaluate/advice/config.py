"""How much `exitax advise` measures, as frozen data that is checked when made."""

from __future__ import annotations

import dataclasses

from exitax.decode import OF_SCORES, Confidence
from exitax.errors import UserError, choose
from exitax.evaluate.thresholds import DEFAULT_THRESHOLDS, check_thresholds


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdviseConfig:
  """What is measured.

  Attributes:
    rows: held-out rows to score at every exit, spread evenly.
    prompts: held-out prompts that the model continues, one at a time.
    prompt_tokens: length of each.
    new_tokens: tokens to generate after each.
    max_drafts: most drafts of a round that are considered.
    thresholds: of deferred exits, in [0, 1].
    measure: of confidence, a function of one exit's scores.
    agreement: share of the model's own tokens that a threshold must keep to be recommended.
    worthwhile: speed-up from which early exit is said to pay.
    part_repeats: times that every part of a step is timed.
    repeats: times that whole decoding is timed, in turn with full depth.
    seconds: decoding time after which no further repeat is begun.

  Raises:
    UserError: a value out of range.
  """

  rows: int = 128
  prompts: int = 6
  prompt_tokens: int = 32
  new_tokens: int = 128
  max_drafts: int = 7
  thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
  measure: Confidence = Confidence.MAX_PROB
  agreement: float = 0.99
  worthwhile: float = 1.1
  part_repeats: int = 7
  repeats: int = 5
  seconds: float = 60.0

  def __post_init__(self) -> None:
    object.__setattr__(self, 'thresholds', check_thresholds(self.thresholds))
    object.__setattr__(self, 'measure', choose(Confidence, self.measure, name='measure'))
    if self.measure not in OF_SCORES:
      known = ', '.join(item.value for item in OF_SCORES)
      raise UserError(
        f"measure={self.measure.value} is not a function of one exit's scores: choose {known}"
      )
    for name in ('rows', 'prompts', 'prompt_tokens', 'new_tokens', 'part_repeats', 'repeats'):
      if getattr(self, name) < 1:
        raise UserError(f'{name}={getattr(self, name)} must be at least 1')
    if not 1 <= self.max_drafts <= 31:
      raise UserError(f'max_drafts={self.max_drafts} is outside 1 to 31')
    if not 0 < self.agreement <= 1:
      raise UserError(f'agreement={self.agreement} is outside (0, 1]: choose such as 0.99')
    if not self.worthwhile >= 1:
      raise UserError(f'worthwhile={self.worthwhile} must be at least 1')
