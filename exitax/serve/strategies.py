"""From what a request says about exits to a plan and thresholds, or a clear no."""

from __future__ import annotations

import dataclasses

from exitax.checkpoint import CERTIFIED, Certificate
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

# A text is `checkpoint.CERTIFIED`.
Threshold = float | list[float] | str


@dataclasses.dataclass(frozen=True)
class Guarantee:
  """A certificate and how this server runs the model.

  Attributes:
    certificate: of the model.
    weights: format of the matrices.
    kv_cache: format of keys and values.
  """

  certificate: Certificate
  weights: str = 'compute'
  kv_cache: str = 'compute'

  def threshold(self, *, confidence: str, max_tokens: int, temperature: float) -> float:
    """The certified threshold.

    Raises:
      UserError: the certificate does not speak of such a request; says why.
    """
    self.certificate.check_use(
      max_new_tokens=max_tokens,
      temperature=temperature,
      strategy=DEFERRED,
      measure=confidence,
      weights=self.weights,
      kv_cache=self.kv_cache,
    )
    return self.certificate.threshold


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
    confidence: str | None = None,
    default: str | None = None,
    threshold: float | tuple[float, ...] | str | None = None,
    num_top: int = 0,
    guarantee: Guarantee | None = None,
    max_thinkers: int = 1,
  ) -> None:
    """Checks the server's own settings.

    Args:
      config: the model.
      confidence: what thresholds are compared with; compiled, so one for all requests. None takes
        the certificate's if the threshold is 'certified', else 'max_prob'.
      default: strategy of requests that name none; by default 'deferred' with a threshold, else
        'speculative', or 'full' without exits.
      threshold: of requests that exit early and name none; None asks them for one. 'certified' is for
        the requests that the certificate speaks of, and the others run without loss.
      num_top: alternatives whose log-probabilities are recorded per token.
      guarantee: the model's certificate, if it has one.
      max_thinkers: of a request at most.

    Raises:
      UserError: a strategy or threshold that the model has no use for.
    """
    self._config = config
    if confidence is None:
      confidence = Confidence.MAX_PROB.value
      if guarantee is not None and threshold == CERTIFIED:
        confidence = guarantee.certificate.measure
    self.confidence = choose(Confidence, confidence, name='confidence')
    self._threshold, self._num_top, self._guarantee = threshold, num_top, guarantee
    self._max_thinkers = max_thinkers
    self.plans = self._make_plans()
    self._lossless = SPECULATIVE if config.exits else FULL
    self.default = default or (self._lossless if threshold is None else DEFERRED)
    if self.default not in self.plans:
      raise UserError(f'strategy={self.default!r}: {self._why_not(self.default)}')
    if threshold == CERTIFIED:
      self._certified(max_tokens=1, temperature=0.0)  # It must speak of some requests at least.
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
  def of_groups(self) -> tuple[StepPlan, ...]:
    """Plans that thinkers may decode with."""
    return tuple(plan for name, plan in self.plans.items() if name != SPECULATIVE)

  @property
  def default_threshold(self) -> float | tuple[float, ...] | str | None:
    """Threshold of requests that exit early and name none."""
    return self._threshold

  @property
  def has_certificate(self) -> bool:
    """Whether requests may ask for the certified threshold."""
    return self._guarantee is not None

  def choose(
    self,
    *,
    strategy: str | None = None,
    threshold: Threshold | None = None,
    confidence: str | None = None,
    use_early_exit: bool | None = None,
    max_tokens: int = 1,
    temperature: float = 0.0,
    together: bool = False,
  ) -> Chosen:
    """What a request's fields ask for.

    Args:
      strategy: its name, or None.
      threshold: a number, one per exit, 'certified', or None.
      confidence: the measure that the request expects.
      use_early_exit: False forbids exits, True asks for them.
      max_tokens: tokens to generate at most, which certificates limit.
      temperature: of sampling; certificates are for 0.
      together: whether thinkers ask, who cannot speculate.

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
    asked = strategy is not None or threshold is not None or bool(use_early_exit)
    name = strategy or (DEFERRED if asked else self.default)
    if together and name == SPECULATIVE:
      if strategy is not None:
        raise bad_policy(
          f'strategy={SPECULATIVE!r} drafts the text of one: with thinkers choose {FULL!r} or {DEFERRED!r}',
          param='strategy',
        )
      name = FULL
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
    wanted = self._threshold if threshold is None else threshold
    if not isinstance(wanted, str):
      return Chosen(strategy=name, thresholds=self._thresholds(wanted))
    if wanted != CERTIFIED:
      raise bad_policy(
        f'threshold={wanted!r} is not known: give a number, or {CERTIFIED!r}', param='threshold'
      )
    try:
      if together:
        raise UserError('certificates speak of single texts: with thinkers give a number')
      certified = self._certified(max_tokens=max_tokens, temperature=temperature)
    except UserError as error:
      if asked:
        raise bad_policy(str(error), param='threshold') from None
      lossless = FULL if together else self._lossless
      return Chosen(strategy=lossless, thresholds=self._never())
    return Chosen(strategy=name, thresholds=self._thresholds(certified))

  def _without_exits(self, strategy: str | None, threshold: Threshold | None) -> Chosen:
    if strategy not in (None, FULL) or threshold is not None:
      field = 'threshold' if threshold is not None else 'strategy'
      raise bad_policy(
        f'use_early_exit=false contradicts {field}: leave one of them out', param='use_early_exit'
      )
    return Chosen(strategy=FULL, thresholds=self._never())

  def _certified(self, *, max_tokens: int, temperature: float) -> float:
    if self._guarantee is None:
      raise UserError(
        'this model has no certificate: make one with `exitax calibrate`, or give a number'
      )
    return self._guarantee.threshold(
      confidence=self.confidence.value, max_tokens=max_tokens, temperature=temperature
    )

  def _thresholds(self, value: float | list[float] | tuple[float, ...] | None) -> tuple[float, ...]:
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
    # All thinkers of a row may leave early in one step.
    room = max(deferred.pending_capacity, self._max_thinkers)
    deferred = dataclasses.replace(deferred, pending_capacity=room)
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
