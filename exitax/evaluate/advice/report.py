"""What `exitax advise` found, as frozen data and as files. Every number says measured or predicted."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from exitax.checkpoint import write_bytes_atomic, write_json_atomic
from exitax.evaluate.facts import DataFacts, MachineFacts, ModelFacts

FORMAT = 1
JSON_FILE = 'advice.json'
PICTURE_FILE = 'advice.png'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitFacts:
  """How one exit compares with the final layer. All measured.

  Attributes:
    layer: layers before it.
    held_out_agreement: share of held-out tokens where it ranks first what the final layer does.
    own_agreement: the same along the text that the model writes itself, which is what speculation meets.
    reach: share of runs of agreement along its own text that are at least 0, 1, 2, ... tokens long.
  """

  layer: int
  held_out_agreement: float
  own_agreement: float
  reach: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculationRow:
  """One way to speculate.

  Attributes:
    layer: drafts are made after it.
    num_drafts: of every round.
    tokens_per_round: along the model's own text, counted: what would happen.
    formula: (1 - a^(d+1)) / (1 - a) from the exit's agreement.
    speed_up: predicted from a round's time and `tokens_per_round`.
    formula_speed_up: predicted from a round's time and `formula`.
  """

  layer: int
  num_drafts: int
  tokens_per_round: float
  formula: float
  speed_up: float
  formula_speed_up: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThresholdSpeed:
  """One threshold, along the model's own text.

  Attributes:
    threshold: in [0, 1].
    agreement: share of tokens that the exit taken and the final layer both rank first.
    layers: mean layers per token.
    deferred: predicted speed-up of deferred exits.
    copy_state: predicted speed-up of copied states, which do not keep the text exact.
  """

  threshold: float
  agreement: float
  layers: float
  deferred: float
  copy_state: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
  """A prediction beside its measurement, in turns with full depth.

  Attributes:
    name: what was decoded.
    predicted: speed-up; None where nothing predicts it.
    measured: median over repeats of full depth's time over this one's.
    same_text: share of tokens equal to full depth's at the same place.
  """

  name: str
  predicted: float | None
  measured: float
  same_text: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdviceReport:
  """Everything that was measured and predicted.

  Attributes:
    model: which model.
    data: on which text.
    machine: where.
    measure: of confidence.
    exits: measured agreement of each exit.
    oracle_layers: mean layers per held-out token at the earliest exit that agrees: measured.
    costs: seconds of the parts of a step: measured.
    draft_costs: seconds of rounds of speculation, as `Speculative(costs=DraftCosts(...))` reads them: measured.
    speculation: predicted, for every exit and number of drafts.
    thresholds: predicted, for every threshold.
    agreement: what a threshold must keep to be recommended.
    worthwhile: speed-up from which early exit is said to pay.
    full_tokens_per_second: of full depth, one prompt at a time: measured.
    checks: predictions beside measurements.
    seconds: what all of it took.
  """

  model: ModelFacts
  data: DataFacts
  machine: MachineFacts
  measure: str
  exits: tuple[ExitFacts, ...]
  oracle_layers: float
  costs: tuple[dict[str, Any], ...]
  draft_costs: dict[str, Any]
  speculation: tuple[SpeculationRow, ...]
  thresholds: tuple[ThresholdSpeed, ...]
  agreement: float
  worthwhile: float
  full_tokens_per_second: float
  checks: tuple[Check, ...]
  seconds: float

  @property
  def best_speculation(self) -> SpeculationRow:
    """The exit and number of drafts with the highest predicted speed-up."""
    return max(self.speculation, key=lambda row: row.speed_up)

  @property
  def best_threshold(self) -> ThresholdSpeed:
    """The fastest threshold, as predicted, that keeps enough of the tokens."""
    return best_threshold(self.thresholds, self.agreement)

  def check(self, name: str) -> Check | None:
    """The check of that name."""
    return next((check for check in self.checks if check.name == name), None)

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON values, with the verdict."""
    from exitax.evaluate.advice.verdict import verdict_of

    verdict = dataclasses.asdict(verdict_of(self))
    return {'format': FORMAT, **dataclasses.asdict(self), 'verdict': verdict}


def best_threshold(rows: tuple[ThresholdSpeed, ...], agreement: float) -> ThresholdSpeed:
  """The fastest row that keeps `agreement`; the highest threshold if none does."""
  kept = [row for row in rows if row.agreement >= agreement]
  return max(kept or rows[:1], key=lambda row: row.deferred)


def write_advice(report: AdviceReport, directory: str | os.PathLike[str]) -> tuple[Path, Path]:
  """Writes `advice.png` and `advice.json`, each whole or not at all; returns their paths.

  Raises:
    OSError: the directory is not writable or the disk is full; older files stay as they are.
  """
  from exitax.evaluate.advice.picture import draw_advice  # Late: matplotlib is slow to import.
  from exitax.evaluate.picture import to_png

  picture, table = Path(directory) / PICTURE_FILE, Path(directory) / JSON_FILE
  content = to_png(draw_advice(report))
  write_json_atomic(table, report.to_dict())
  write_bytes_atomic(picture, content)
  return picture, table
