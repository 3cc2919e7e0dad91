"""What an evaluation found, as frozen data, and as JSON, CSV, a picture and plain text."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from pathlib import Path
from typing import Any

from exitax.checkpoint import write_bytes_atomic, write_json_atomic
from exitax.evaluate.facts import DataFacts, MachineFacts, ModelFacts
from exitax.evaluate.speed import SpeedReport, SpeedRow
from exitax.evaluate.thresholds import DepthScore, ThresholdRow
from exitax.objectives import ExitScore

FORMAT = 1
JSON_FILE = 'evaluation.json'
CSV_FILE = 'evaluation.csv'
PICTURE_FILE = 'evaluation.png'


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationReport:
  """Everything that one evaluation measured.

  Attributes:
    model: which model.
    data: on which text.
    machine: where the times were taken.
    exits: every exit alone, shallow to deep, the final layer last.
    exit_agreement: for each of `exits`, the share of tokens whose highest score is also the final
      layer's.
    thresholds: one row per measure of confidence and threshold, highest threshold first.
    oracle: each token at the earliest exit that agrees with the final layer.
    speed: times of decoding, or None where they were not taken.
    seconds: what the evaluation took.
  """

  model: ModelFacts
  data: DataFacts
  machine: MachineFacts
  exits: tuple[ExitScore, ...]
  exit_agreement: tuple[float, ...]
  thresholds: tuple[ThresholdRow, ...]
  oracle: DepthScore
  speed: SpeedReport | None
  seconds: float

  @property
  def confidences(self) -> tuple[str, ...]:
    """The measures of confidence, the main one first."""
    return tuple(dict.fromkeys(row.confidence for row in self.thresholds))

  def rows_of(self, confidence: str) -> tuple[ThresholdRow, ...]:
    """The threshold rows of one measure."""
    return tuple(row for row in self.thresholds if row.confidence == confidence)

  def speed_of(self, row: ThresholdRow) -> SpeedRow | None:
    """What decoding with the threshold of `row` took, where that was measured."""
    if self.speed is None or self.speed.confidence != row.confidence:
      return None
    return next((s for s in self.speed.rows if s.threshold == row.threshold), None)

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON values."""
    return {'format': FORMAT, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportFiles:
  """Where a report was written."""

  json: Path
  csv: Path
  picture: Path


def write_report(report: EvaluationReport, directory: str | os.PathLike[str]) -> ReportFiles:
  """Writes `evaluation.json`, `evaluation.csv` and `evaluation.png`, each whole or not at all.

  Raises:
    OSError: the directory is not writable or the disk is full; older files stay as they are.
  """
  from exitax.evaluate.picture import draw_report, to_png  # Late: matplotlib is slow to import.

  folder = Path(directory)
  files = ReportFiles(json=folder / JSON_FILE, csv=folder / CSV_FILE, picture=folder / PICTURE_FILE)
  picture = to_png(draw_report(report))
  write_json_atomic(files.json, report.to_dict())
  write_bytes_atomic(files.csv, to_csv(report).encode())
  write_bytes_atomic(files.picture, picture)
  return files


def to_csv(report: EvaluationReport) -> str:
  """One line per fixed exit, per threshold and for the oracle, with a header.

  Cells that do not apply are empty. The first columns (`kind`, `name`) say what a line is:
  `exit,exit_2`, `threshold,max_prob`, `oracle,oracle`.
  """
  lines = [
    *(_exit_cells(report, i) for i in range(len(report.exits))),
    *(_threshold_cells(report, row) for row in report.thresholds),
    {'kind': 'oracle', 'name': 'oracle', **_depth_cells(report, report.oracle)},
  ]
  columns = list(dict.fromkeys(name for line in [_all_cells(report), *lines] for name in line))
  out = io.StringIO()
  writer = csv.DictWriter(out, columns, restval='', lineterminator='\n')
  writer.writeheader()
  writer.writerows(lines)
  return out.getvalue()


def _all_cells(report: EvaluationReport) -> dict[str, Any]:
  """A line with every column that is always there, in reading order."""
  fixed = ('kind', 'name', 'threshold', 'effective_layers', 'nll', 'bits_per_byte', 'accuracy')
  return dict.fromkeys((*fixed, 'agreement', *_share_names(report), *_SPEED_CELLS), '')


_SPEED_CELLS = {
  'tokens_per_second': 'tokens_per_second',
  'speed_up': 'speed_up',
  'decoded_effective_layers': 'effective_layers',
  'decoded_layer_passes': 'layer_passes',
  'decoded_agreement': 'agreement',
}


def _share_names(report: EvaluationReport) -> tuple[str, ...]:
  return tuple(f'share_{score.name}' for score in report.exits)


def _exit_cells(report: EvaluationReport, index: int) -> dict[str, Any]:
  score = report.exits[index]
  return {
    'kind': 'exit',
    'name': score.name,
    'effective_layers': score.layer,
    'nll': score.nll,
    'bits_per_byte': score.bits_per_byte,
    'accuracy': score.accuracy,
    'agreement': report.exit_agreement[index],
  }


def _depth_cells(report: EvaluationReport, score: DepthScore) -> dict[str, Any]:
  return {
    'effective_layers': score.effective_layers,
    'nll': score.nll,
    'bits_per_byte': score.bits_per_byte,
    'accuracy': score.accuracy,
    'agreement': score.agreement,
    **dict(zip(_share_names(report), score.exit_shares, strict=True)),
  }


def _threshold_cells(report: EvaluationReport, row: ThresholdRow) -> dict[str, Any]:
  cells = {
    'kind': 'threshold',
    'name': row.confidence,
    'threshold': row.threshold,
    **_depth_cells(report, row),
  }
  speed = report.speed_of(row)
  if speed is not None:
    cells |= {name: getattr(speed, field) for name, field in _SPEED_CELLS.items()}
  return cells
