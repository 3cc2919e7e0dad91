"""Exit policies: where a token may leave the stack of layers, and what follows for the cache."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from typing import Protocol

from exitax.decode.confidence import Confidence
from exitax.errors import UserError
from exitax.layers import HeadKind
from exitax.models import ExitConfig, ModelConfig


class Record(enum.Enum):
  """What is recorded of each decision."""

  DECISION = 'decision'  # Exit layer and confidence; agreement where the final layer decided.
  AGREEMENT = 'agreement'  # Every token goes on to the final layer, to compare: no time is saved.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitPlan:
  """The static part of a policy: what a step is compiled for. Thresholds are data.

  Attributes:
    exits: the exits in use, by ascending layer.
    num_layers: layers of the model.
    confidence: what is compared with the thresholds.
    pending_capacity: tokens of a row that deep layers may lag behind before they must catch up.
    lane_buckets: numbers of lanes that deep layers are compiled for; the last is the capacity.
    record: what is recorded.
  """

  exits: tuple[ExitConfig, ...]
  num_layers: int
  confidence: Confidence
  pending_capacity: int = 1
  lane_buckets: tuple[int, ...] = (1,)
  record: Record = Record.DECISION

  @property
  def segments(self) -> tuple[range, ...]:
    """Spans of layers between exits: `[0:l1], [l1:l2], ..., [ln:L]`."""
    cuts = (0, *(item.layer for item in self.exits), self.num_layers)
    return tuple(range(a, b) for a, b in itertools.pairwise(cuts))

  @property
  def head_layers(self) -> tuple[int, ...]:
    """Layers of the exits that need cache entries of their own."""
    return tuple(item.layer for item in self.exits if item.head is HeadKind.LAYER)


class ExitPolicy(Protocol):
  """What `generate` asks of a policy."""

  def plan(self, config: ModelConfig) -> ExitPlan:
    """The static part."""
    ...

  def thresholds(self, config: ModelConfig) -> tuple[float, ...]:
    """One threshold per exit of the plan; a token stops where its confidence is above (`>`)."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FullDepth:
  """Runs every layer for every token.

  Attributes:
    confidence: what is recorded of the final layer.
  """

  confidence: Confidence = Confidence.MAX_PROB

  def plan(self, config: ModelConfig) -> ExitPlan:
    return ExitPlan(exits=(), num_layers=config.num_layers, confidence=self.confidence)

  def thresholds(self, config: ModelConfig) -> tuple[float, ...]:
    return ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeferredExit:
  """Stops at the first exit that is confident enough; deep layers catch up later, exactly.

  The hidden state at the exit is kept. When a token of the row goes deep, only the deep layers run,
  over all kept tokens at once, so that every cached key is that of a full pass: tokens are those of
  a model that computes everything and takes the first confident exit (FREE, arXiv 2310.05424).

  Attributes:
    threshold: in [0, 1], one for all exits or one per exit. Confidence must be above it: 1.0 never
      exits. Sweeping it does not recompile.
    confidence: what is compared with it.
    layers: layers of the exits to use; None uses all of the model's.
    pending_capacity: tokens of a row that may wait; then they are filled even if nobody goes deep.
    record: what is recorded.
  """

  threshold: float | tuple[float, ...]
  confidence: Confidence = Confidence.MAX_PROB
  layers: tuple[int, ...] | None = None
  pending_capacity: int = 16
  record: Record = Record.DECISION

  def plan(self, config: ModelConfig) -> ExitPlan:
    """The static part.

    Raises:
      UserError: an exit that the model lacks, or a capacity below 1.
    """
    if self.pending_capacity < 1:
      raise UserError(f'pending_capacity={self.pending_capacity} must be at least 1')
    return ExitPlan(
      exits=self._exits(config),
      num_layers=config.num_layers,
      confidence=self.confidence,
      pending_capacity=self.pending_capacity,
      lane_buckets=lane_buckets(self.pending_capacity),
      record=self.record,
    )

  def thresholds(self, config: ModelConfig) -> tuple[float, ...]:
    """One threshold per exit in use.

    Raises:
      UserError: a threshold outside [0, 1], or not one per exit.
    """
    num_exits = len(self._exits(config))
    values = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * num_exits
    if len(values) != num_exits:
      raise UserError(
        f'{len(values)} thresholds for {num_exits} exits: give one for all or one per exit'
      )
    checked = (self.threshold,) if not isinstance(self.threshold, tuple) else values
    for value in checked:
      if not 0.0 <= value <= 1.0:
        raise UserError(f'threshold={value} is outside [0, 1]: 0 exits first, 1 never exits early')
    return values

  def _exits(self, config: ModelConfig) -> tuple[ExitConfig, ...]:
    if self.layers is None:
      return config.exits
    known = {item.layer: item for item in config.exits}
    for layer in self.layers:
      if layer not in known:
        listed = ', '.join(map(str, known)) or 'none'
        raise UserError(f'no exit at layer {layer}: the model has exits at layers {listed}')
    return tuple(known[layer] for layer in sorted(set(self.layers)))


def lane_buckets(capacity: int) -> tuple[int, ...]:
  """Powers of 4 below `capacity`, then `capacity`: few programs, and padding costs little.

  Deep layers read their weights once however many lanes there are, so a bucket that is 4 times too
  large is still far from 4 times too slow.
  """
  buckets = [1]
  while buckets[-1] * 4 < capacity:
    buckets.append(buckets[-1] * 4)
  return (*buckets, capacity) if capacity > 1 else (1,)
