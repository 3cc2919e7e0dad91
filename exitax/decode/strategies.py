"""Policies by name: what `--strategy` means."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from exitax.decode.acceptance import Acceptance
from exitax.decode.confidence import Confidence
from exitax.decode.policies import (
  CopyStateExit,
  DeferredExit,
  ExitPolicy,
  FullDepth,
  PipelineExit,
  RecomputeExit,
  Speculative,
)
from exitax.errors import UserError, choose
from exitax.models import ModelConfig


class Strategy(enum.Enum):
  """Ways of decoding one model."""

  FULL = 'full'  # Every layer for every token.
  DEFERRED = 'deferred'  # Exits at thresholds; deep layers catch up. Exact caches.
  RECOMPUTE = (
    'recompute'  # Exits at thresholds; later tokens run again. Exact caches, for comparison.
  )
  PIPELINE = 'pipeline'  # Exits at thresholds; stages of a mesh work on several tokens. Exact.
  COPY_STATE = 'copy_state'  # Exits at thresholds; deep keys from the exit's stream. Approximate.
  SPECULATIVE = 'speculative'  # Drafts at exits, verified: the tokens of FULL.


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategySettings:
  """Everything that a strategy may be told; each reads its own, and refuses what it cannot honour.

  Attributes:
    strategy: which; None takes DEFERRED if there is a threshold, else SPECULATIVE if the model has
      exits, else FULL.
    threshold: exits where the confidence is above it; one number, or one per exit.
    confidence: the measure.
    patience: exits that must agree, for PATIENCE.
    decay: how fast thresholds fall with the tokens generated.
    exit_layer: drafts after this layer always (with `num_drafts`).
    num_drafts: drafts of every round (with `exit_layer`).
    acceptance: the rule for sampled drafts.
    num_top: alternatives whose log-probabilities are recorded per token.

  Raises:
    UserError: an unknown name.
  """

  strategy: Strategy | str | None = None
  threshold: float | Sequence[float] | None = None
  confidence: Confidence | str = Confidence.MAX_PROB
  patience: int = 2
  decay: float = 0.0
  exit_layer: int | None = None
  num_drafts: int | None = None
  acceptance: Acceptance | str = Acceptance.COUPLED
  num_top: int = 0

  def __post_init__(self) -> None:
    if self.strategy is not None:
      object.__setattr__(self, 'strategy', choose(Strategy, self.strategy, name='strategy'))
    for name, kind in (('confidence', Confidence), ('acceptance', Acceptance)):
      object.__setattr__(self, name, choose(kind, getattr(self, name), name=name))

  def policy(self, config: ModelConfig) -> ExitPolicy:
    """The policy for a model.

    Raises:
      UserError: a strategy that the model cannot do, or settings that the strategy does not have.
    """
    strategy = self._strategy(config)
    if strategy is not Strategy.FULL and not config.exits:
      raise UserError(
        f'strategy={strategy.value} needs exits, and this model has none: use strategy=full'
      )
    if strategy is not Strategy.SPECULATIVE:
      self._check_unset('exit_layer', 'num_drafts', 'acceptance', of='speculation', not_to=strategy)
    if strategy in (Strategy.FULL, Strategy.SPECULATIVE):
      return self._lossless(strategy)
    return self._at_threshold(strategy)

  def _check_unset(self, *names: str, of: str, not_to: Strategy) -> None:
    """Refuses what was set and does nothing, rather than let it be believed to act."""
    for name in names:
      value, default = getattr(self, name), getattr(StrategySettings(), name)
      if value != default:
        shown = value.value if isinstance(value, enum.Enum) else value
        raise UserError(
          f'{name}={shown} belongs to {of}, not to strategy={not_to.value}: leave it out'
        )

  def _strategy(self, config: ModelConfig) -> Strategy:
    if self.strategy is not None:
      return choose(Strategy, self.strategy, name='strategy')
    if self.threshold is not None:
      return Strategy.DEFERRED
    return Strategy.SPECULATIVE if config.exits else Strategy.FULL

  def _lossless(self, strategy: Strategy) -> ExitPolicy:
    if self.threshold is not None:
      raise UserError(
        f'threshold={self.threshold} has no use in strategy={strategy.value}, which changes no '
        'token: leave it out, or use strategy=deferred'
      )
    self._check_unset('patience', 'decay', of='strategies with a threshold', not_to=strategy)
    measure = choose(Confidence, self.confidence, name='confidence')
    if strategy is Strategy.FULL:
      return FullDepth(confidence=measure, num_top=self.num_top)
    return Speculative(
      exit_layer=self.exit_layer,
      num_drafts=self.num_drafts,
      acceptance=choose(Acceptance, self.acceptance, name='acceptance'),
      confidence=measure,
      num_top=self.num_top,
    )

  def _at_threshold(self, strategy: Strategy) -> ExitPolicy:
    if self.threshold is None:
      raise UserError(
        f'strategy={strategy.value} needs a threshold in [0, 1]: confidence above it exits'
      )
    kinds = {
      Strategy.DEFERRED: DeferredExit,
      Strategy.RECOMPUTE: RecomputeExit,
      Strategy.PIPELINE: PipelineExit,
      Strategy.COPY_STATE: CopyStateExit,
    }
    return kinds[strategy](
      threshold=self.threshold,
      confidence=choose(Confidence, self.confidence, name='confidence'),
      patience=self.patience,
      decay=self.decay,
      num_top=self.num_top,
    )
