"""From what a request says about exits to a plan and thresholds, or a clear no."""

from __future__ import annotations

import dataclasses

from exitax.decode import (
  OF_SCORES,
  Confidence,
  DeferredExit,
  FullDepth,
  Speculative,
  StepPlan,
  Strategy,
)
from exitax.errors import UserError, choose
from exitax.models import ModelConfig
from exitax.serve.refusals import Refusal, bad_policy

FULL = Strategy.FULL.value
DEFERRED = Strategy.DEFERRED.value
SPECULATIVE = Strategy.SPECULATIVE.value
# Confidence must be above a threshold, so this one is never met.
NEVER = 1.0

Threshold = float | list[float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
  """How a request decodes.

  Attributes:
    strategy: name of an entry of `Strategies.plans`.
    thresholds: one per exit of its plan.
  """

  strategy: str
  thresholds: tuple[float, ...]


class Strategies:
  """What one server can do: each strategy's plan, all of them over one and the same state."""

  def __init__(
    self,
    config: ModelConfig,
    *,
    confidence: str = 'max_prob',
    default: str | None = None,
    threshold: float | tuple[float, ...] | None = None,
    num_top: int = 0,
  ) -> None:
    """Checks the server's own settings.

    Args:
      config: the model.
      confidence: what thresholds are compared with; compiled, so one for all requests.
      default: strategy of requests that name none; by default 'deferred' with a threshold, else
        'speculative', or 'full' without exits.
      threshold: of requests that exit early and name none; None asks them for one.
      num_top: alternatives whose log-probabilities are recorded per token.

    Raises:
      UserError: a strategy or threshold that the model has no use for.
    """
    self._config = config
    self.confidence = choose(Confidence, confidence, name='confidence')
    self._threshold, self._num_top = threshold, num_top
    self.plans = self._make_plans()
    lossless = SPECULATIVE if config.exits else FULL
    self.default = default or (lossless if threshold is None else DEFERRED)
    if self.default not in self.plans:
      raise UserError(f'strategy={self.default!r}: {self._why_not(self.default)}')
    try:
      self.choose()
    except Refusal as refusal:
      raise UserError(refusal.message) from None

  @property
  def layers(self) -> tuple[int, ...]:
    """Layers at which tokens may be chosen, the last one included."""
    return self._config.depths

  @property
  def layout_first(self) -> tuple[StepPlan, ...]:
    """All plans; the first keeps most beside the cache, and the shared state is laid out for it."""
    return (self.plans.get(SPECULATIVE, self.plans[FULL]), *self.plans.values())

  @property
  def default_threshold(self) -> float | tuple[float, ...] | None:
    """Threshold of requests that exit early and name none."""
    return self._threshold

  def choose(
    self,
    *,
    strategy: str | None = None,
    threshold: Threshold | None = None,
    confidence: str | None = None,
    use_early_exit: bool | None = None,
  ) -> Chosen:
    """What a request's fields ask for.

    Raises:
      Refusal: 422, values out of range, fields that contradict each other, no such strategy.
    """
    if confidence is not None and confidence != self.confidence.value:
      raise bad_policy(
        f'confidence={confidence!r}, but this server was started with --confidence='
        f'{self.confidence.value}: leave the field out or start another server',
        param='confidence',
      )
    if strategy is not None and strategy not in self.plans:
      raise bad_policy(f'strategy={strategy!r}: {self._why_not(strategy)}', param='strategy')
    if use_early_exit is False:
      return self._without_exits(strategy, threshold)
    name = strategy or (DEFERRED if threshold is not None or use_early_exit else self.default)
    if name not in self.plans:
      field = 'threshold' if threshold is not None else 'use_early_exit'
      raise bad_policy(f'{field}: {self._why_not(name)}', param=field)
    if name != DEFERRED:
      if threshold is not None or use_early_exit:
        field = 'threshold' if threshold is not None else 'use_early_exit'
        raise bad_policy(
          f'{field} does nothing with strategy={name!r}: leave it out or choose {DEFERRED!r}',
          param=field,
        )
      return Chosen(strategy=name, thresholds=self._never())
    return Chosen(strategy=name, thresholds=self._thresholds(threshold))

  def _without_exits(self, strategy: str | None, threshold: Threshold | None) -> Chosen:
    if strategy not in (None, FULL) or threshold is not None:
      field = 'threshold' if threshold is not None else 'strategy'
      raise bad_policy(
        f'use_early_exit=false contradicts {field}: leave one of them out', param='use_early_exit'
      )
    return Chosen(strategy=FULL, thresholds=self._never())

  def _thresholds(self, threshold: Threshold | None) -> tuple[float, ...]:
    value = self._threshold if threshold is None else threshold
    if value is None:
      raise bad_policy(
        'give threshold, in [0, 1]: this server was started without --threshold',
        param='threshold',
      )
    wanted = tuple(map(float, value)) if isinstance(value, list | tuple) else float(value)
    try:
      return DeferredExit(threshold=wanted).thresholds(self._config)
    except UserError as error:
      raise bad_policy(str(error), param='threshold') from None

  def _never(self) -> tuple[float, ...]:
    return (NEVER,) * len(self._config.exits)

  def _make_plans(self) -> dict[str, StepPlan]:
    config, num_top = self._config, self._num_top
    if not config.exits:
      return {FULL: FullDepth(confidence=self._of_scores, num_top=num_top).plan(config)}
    # Thresholds are data: full depth is deferred exit with thresholds that nothing meets.
    deferred = DeferredExit(threshold=NEVER, confidence=self.confidence, num_top=num_top)
    speculative = Speculative(
      confidence=self._of_scores, num_top=num_top, pending_capacity=deferred.pending_capacity
    )
    plan = deferred.plan(config)
    return {FULL: plan, DEFERRED: plan, SPECULATIVE: speculative.plan(config)}

  @property
  def _of_scores(self) -> Confidence:
    """What is recorded where nothing is compared with it."""
    return self.confidence if self.confidence in OF_SCORES else Confidence.MAX_PROB

  def _why_not(self, name: str) -> str:
    known = ', '.join(map(repr, self.plans))
    if name in (DEFERRED, SPECULATIVE):
      return f'the model has no exits, so every token runs all layers: choose {known}'
    return f'not known: choose {known}'
