"""What is certified and with how much work, as frozen data that is checked when made."""

from __future__ import annotations

import dataclasses
import enum

from exitax.decode import OF_SCORES, Confidence, Strategy
from exitax.errors import UserError, choose
from exitax.evaluate.calibration.losses import Metric
from exitax.evaluate.thresholds import DEFAULT_THRESHOLDS, check_thresholds


class Method(enum.Enum):
  """Which guarantee."""

  LTT = 'ltt'  # Learn then Test: with high probability.
  CRC = 'crc'  # Conformal risk control: in expectation.


class Forcing(enum.Enum):
  """Which text an early exit is judged along."""

  FREE = 'free'  # It writes its own: what a user gets.
  FORCED = 'forced'  # Full depth's text, token by token: differences do not add up.


class Draw(enum.Enum):
  """What one example is, and so what the guarantee is about."""

  WINDOWS = 'windows'  # A stretch of a held-out document; a long document gives many.
  DOCUMENTS = 'documents'  # The beginning of a held-out document, one each.


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
  """What is certified. Choices are members, or their values as gin and flags write them.

  Attributes:
    metric: the loss.
    risk: limit of its expectation, in (0, 1).
    confidence: probability that the guarantee holds, in (0, 1); CRC does not use it.
    method: which guarantee.
    measure: of confidence in a token.
    strategy: how skipped layers are filled; the exact ones share their certificates.
    forcing: which text exits are judged along; `FORCED` is for token_agreement alone.
    draw: what one example is.
    examples: how many sequences at most.
    thresholds: from 1 on, fixed before any example is seen.
    prompt_tokens: length of each prompt.
    max_new_tokens: tokens to generate, or to score after the prompt.
    batch_size: prompts decoded at once.
    seed: decides which examples are drawn.

  Raises:
    UserError: a value out of range, or two that do not go together.
  """

  metric: Metric = Metric.TOKEN_AGREEMENT
  risk: float = 0.02
  confidence: float = 0.95
  method: Method = Method.LTT
  measure: Confidence = Confidence.MAX_PROB
  strategy: Strategy = Strategy.DEFERRED
  forcing: Forcing = Forcing.FREE
  draw: Draw = Draw.WINDOWS
  examples: int = 500
  thresholds: tuple[float, ...] = DEFAULT_THRESHOLDS
  prompt_tokens: int = 32
  max_new_tokens: int = 64
  batch_size: int = 32
  seed: int = 0

  def __post_init__(self) -> None:
    for name, kind in (
      ('metric', Metric),
      ('method', Method),
      ('measure', Confidence),
      ('strategy', Strategy),
      ('forcing', Forcing),
      ('draw', Draw),
    ):
      object.__setattr__(self, name, choose(kind, getattr(self, name), name=name))
    for name in ('risk', 'confidence'):
      if not 0 < getattr(self, name) < 1:
        raise UserError(
          f'{name}={getattr(self, name)} is outside (0, 1): choose such as '
          f'{0.02 if name == "risk" else 0.95}'
        )
    for name in ('examples', 'prompt_tokens', 'max_new_tokens', 'batch_size'):
      if getattr(self, name) < 1:
        raise UserError(f'{name}={getattr(self, name)} must be at least 1')
    if self.seed < 0:
      raise UserError(f'seed={self.seed} must be at least 0')
    thresholds = check_thresholds((1.0, *self.thresholds))
    if len(thresholds) < 2:
      raise UserError('thresholds=(1.0,) never exit: give some below 1, such as 0.9')
    object.__setattr__(self, 'thresholds', thresholds)
    self._check_combination()

  def _check_combination(self) -> None:
    if self.strategy in (Strategy.FULL, Strategy.SPECULATIVE):
      raise UserError(
        f'strategy={self.strategy.value} gives the tokens of full depth: nothing to certify'
      )
    if self.strategy is Strategy.PIPELINE:
      raise UserError(
        'strategy=pipeline gives the tokens of deferred, and shares its certificate: calibrate with '
        'strategy=deferred'
      )
    if self.measure is Confidence.CLASSIFIER:
      raise UserError(
        'measure=classifier cannot be certified: a certificate names weights, and not yet the classifiers '
        'that were trained on them; choose max_prob, margin, entropy, patience or cosine'
      )
    tabled = self.metric is Metric.BITS_PER_BYTE or self.forcing is Forcing.FORCED
    if self.forcing is Forcing.FORCED and self.metric is not Metric.TOKEN_AGREEMENT:
      raise UserError(
        f"forcing='forced' is for metric=token_agreement, not {self.metric.value}: choose 'free'"
      )
    if tabled and self.measure not in OF_SCORES:
      known = ', '.join(item.value for item in OF_SCORES)
      raise UserError(
        f'measure={self.measure.value} is known only while decoding, and this loss is worked out '
        f'without: choose {known}, or metric=token_agreement'
      )
    if tabled and self.strategy is Strategy.COPY_STATE:
      raise UserError(
        'strategy=copy_state changes what later tokens see, and this loss is worked out with exact '
        'keys: choose strategy=deferred, or metric=token_agreement'
      )
