"""What is compared: each row of a table of benchmarks leaves the stack of layers in its own way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from exitax.decode import (
  OF_SCORES,
  Confidence,
  DeferredExit,
  ExitPolicy,
  FullDepth,
  Speculative,
  Strategy,
)
from exitax.errors import UserError, choose
from exitax.evaluate.thresholds import check_thresholds, first_exit
from exitax.evaluate.token_table import TokenTable
from exitax.models import ModelConfig

ALL = 'all'
FINAL = 'final'


class Row(Protocol):
  """A way of leaving: for given text by `choose_exits`, for text to be written by `policy`."""

  @property
  def name(self) -> str:
    """What the row is called in tables."""
    ...

  @property
  def policy(self) -> ExitPolicy:
    """How text is written."""
    ...

  @property
  def layers(self) -> tuple[int, ...] | None:
    """Exits whose scores `choose_exits` needs, as layers; None for all of the model's."""
    ...

  def choose_exits(self, table: TokenTable, *, depths: Sequence[int]) -> np.ndarray:
    """Which of `depths` each token of a table leaves at, as indices `[tokens]`."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedDepth:
  """Every token at one exit, or at the final layer.

  Attributes:
    name: `exit_2`, `final`.
    layer: layers run for every token.
    policy: how text is written: the final layer's by any lossless policy.
  """

  name: str
  layer: int
  policy: ExitPolicy

  @property
  def layers(self) -> tuple[int, ...]:
    return (self.layer,)

  def choose_exits(self, table: TokenTable, *, depths: Sequence[int]) -> np.ndarray:
    return np.full(table.num_tokens, list(depths).index(self.layer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstConfident:
  """Each token at the first exit whose confidence is above a threshold, else at the final layer.

  Given text is scored as `exitax.evaluate.threshold_rows` does: every token sees the keys of the full
  model, as it does in decoding with deferred exits.

  Attributes:
    threshold: in [0, 1]; 1 is the full model, 0 the first exit.
    measure: of confidence.
  """

  threshold: float
  measure: Confidence = Confidence.MAX_PROB

  @property
  def name(self) -> str:
    return f'{self.measure.value}>{self.threshold:g}'

  @property
  def layers(self) -> None:
    return None

  @property
  def policy(self) -> ExitPolicy:
    return DeferredExit(threshold=self.threshold, confidence=self.measure)

  def choose_exits(self, table: TokenTable, *, depths: Sequence[int]) -> np.ndarray:
    del depths  # All of them are in the table.
    return first_exit(table.confidence[self.measure.value][:-1] > self.threshold)


def make_rows(
  config: ModelConfig,
  *,
  exits: str = ALL,
  thresholds: Sequence[float] = (),
  confidence: Confidence | str = Confidence.MAX_PROB,
  strategy: Strategy | str = Strategy.FULL,
) -> tuple[Row, ...]:
  """Rows of exits, shallow to deep, then of thresholds, high to low.

  Args:
    config: the model.
    exits: 'all', or layers and 'final' with commas between them, as in '2,4,final'.
    thresholds: of confidence, in [0, 1]; none makes no such row.
    confidence: the measure, a function of one exit's scores.
    strategy: how the final layer writes: FULL, or SPECULATIVE, which writes the same.

  Raises:
    UserError: an exit that the model lacks, a threshold out of range, another strategy or measure.
  """
  measure = choose(Confidence, confidence, name='confidence')
  if measure not in OF_SCORES:
    known = ', '.join(item.value for item in OF_SCORES)
    raise UserError(
      f"confidence={measure.value} is not a function of one exit's scores: choose {known}"
    )
  rows: list[Row] = [
    _fixed(config, layer, final=_final_policy(config, strategy))
    for layer in _exit_layers(config, exits)
  ]
  if thresholds:
    if not config.exits:
      raise UserError(
        f'thresholds={",".join(f"{t:g}" for t in thresholds)} need exits, and this model has none: '
        'leave them out'
      )
    checked = check_thresholds(thresholds)
    rows += [FirstConfident(threshold=threshold, measure=measure) for threshold in checked]
  return tuple(rows)


def _fixed(config: ModelConfig, layer: int, *, final: ExitPolicy) -> FixedDepth:
  name = config.depth_names[config.depths.index(layer)]
  # Of the one exit alone, a threshold of 0 leaves always.
  early = DeferredExit(threshold=0.0, layers=(layer,))
  return FixedDepth(name=name, layer=layer, policy=final if layer == config.num_layers else early)


def _final_policy(config: ModelConfig, strategy: Strategy | str) -> ExitPolicy:
  match choose(Strategy, strategy, name='strategy'):
    case Strategy.FULL:
      return FullDepth()
    case Strategy.SPECULATIVE if config.exits:
      return Speculative()
    case Strategy.SPECULATIVE:
      raise UserError('strategy=speculative needs exits, and this model has none: use full')
    case other:
      raise UserError(
        f'strategy={other.value} is no way of writing with the final layer: choose full or '
        'speculative; thresholds are decoded with deferred exits'
      )


def _exit_layers(config: ModelConfig, exits: str) -> list[int]:
  if exits == ALL:
    return list(config.depths)
  by_name = dict(zip(config.depth_names, config.depths, strict=True))
  by_name |= {str(layer): layer for layer in config.depths}
  names = [name.strip() for name in exits.split(',')]
  for name in names:
    if name not in by_name:
      known = ', '.join([*(str(layer) for layer in config.depths[:-1]), FINAL])
      raise UserError(f'exits={exits}: {name!r} is no exit of this model: choose {ALL}, or {known}')
  return sorted({by_name[name] for name in names})
