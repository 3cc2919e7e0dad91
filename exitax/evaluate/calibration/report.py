"""What a calibration found, as frozen data, as JSON, and as a certificate."""

from __future__ import annotations

import dataclasses
import enum
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from exitax.checkpoint import Certificate, write_bytes_atomic, write_json_atomic
from exitax.evaluate.calibration.config import CalibrateConfig, Forcing, Method
from exitax.evaluate.calibration.losses import Metric
from exitax.evaluate.calibration.risk import RiskDecision
from exitax.evaluate.facts import MachineFacts, ModelFacts

FORMAT = 1
JSON_FILE = 'calibration.json'
PICTURE_FILE = 'calibration.png'

_LOSSES = {
  Metric.TOKEN_AGREEMENT: 'share of tokens that differ from full depth',
  Metric.ROUGE: '1 - ROUGE-L F of the text against full depth',
  Metric.EXACT_MATCH: 'share of outputs that differ from full depth anywhere',
  Metric.BITS_PER_BYTE: 'relative increase of bits per byte over full depth',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationReport:
  """Everything that one calibration measured.

  Attributes:
    model: which model.
    machine: where.
    config: what was asked for.
    population: what the examples were drawn from, in words.
    available: how many sequences that has.
    examples_digest: SHA-256 of the examples' token ids.
    decision: the certified threshold, or what is missing, with the risk of every threshold.
    layers: mean layers per token at each threshold.
    seconds: what it took.
  """

  model: ModelFacts
  machine: MachineFacts
  config: CalibrateConfig
  population: str
  available: int
  examples_digest: str
  decision: RiskDecision
  layers: tuple[float, ...]
  seconds: float

  @property
  def loss(self) -> str:
    """What is bounded, in words."""
    along = ', along its text' if self.config.forcing is Forcing.FORCED else ''
    return _LOSSES[self.config.metric] + along

  @property
  def statement(self) -> str:
    """The guarantee in one sentence; empty where nothing is certified."""
    threshold, config = self.decision.threshold, self.config
    if threshold is None:
      return ''
    limit = f'expected {self.loss} at most {config.risk:g}'
    where = f'threshold {threshold:g} on {config.measure.value}: {limit}'
    if config.method is Method.LTT:
      how = f'with probability {config.confidence:g} over the draw of the examples'
    else:
      how = 'on average over draws of the examples, not with high probability'
    return f'{where}, {how}, for sequences drawn like these: {self.population}'

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON values."""
    content = dataclasses.asdict(self)
    content['config'] = {
      name: value.value if isinstance(value, enum.Enum) else value
      for name, value in content['config'].items()
    }
    return {'format': FORMAT, **content, 'loss': self.loss, 'statement': self.statement}


def make_certificate(report: CalibrationReport, *, checkpoint_digest: str) -> Certificate:
  """The certificate of a calibration that certified a threshold.

  Raises:
    ValueError: it did not.
  """
  decision, config = report.decision, report.config
  if decision.threshold is None:
    raise ValueError('nothing was certified')
  settings = report.to_dict()['config']
  return Certificate(
    statement=report.statement,
    metric=config.metric.value,
    risk=config.risk,
    confidence=config.confidence if config.method is Method.LTT else None,
    method=settings['method'],
    threshold=decision.threshold,
    measure=config.measure.value,
    strategy=config.strategy.value,
    exit_layers=report.model.depths[:-1],
    examples=decision.examples,
    population=report.population,
    examples_digest=report.examples_digest,
    rows=tuple(
      {**dataclasses.asdict(row), 'layers': layers}
      for row, layers in zip(decision.rows, report.layers, strict=True)
    ),
    settings={
      **{
        name: settings[name]
        for name in ('forcing', 'draw', 'prompt_tokens', 'max_new_tokens', 'seed', 'batch_size')
      },
      'temperature': 0.0,
      'patience': 2,
      'decay': 0.0,
      'weights': 'compute',
      'kv_cache': 'compute',
      'precision': report.model.precision,
    },
    checkpoint_step=report.model.step,
    checkpoint_digest=checkpoint_digest,
    versions={
      'exitax': metadata.version('exitax'),
      'python': report.machine.python,
      'jax': report.machine.jax,
    },
    created=report.machine.date,
  )


def write_calibration(
  report: CalibrationReport, directory: str | os.PathLike[str]
) -> tuple[Path, Path]:
  """Writes `calibration.png` and `calibration.json`, each whole or not at all; returns their paths.

  Raises:
    OSError: the directory is not writable or the disk is full; older files stay as they are.
  """
  from exitax.evaluate.calibration.picture import draw_calibration  # Late: matplotlib is slow.
  from exitax.evaluate.picture import to_png

  picture, table = Path(directory) / PICTURE_FILE, Path(directory) / JSON_FILE
  content = to_png(draw_calibration(report))
  write_json_atomic(table, report.to_dict())
  write_bytes_atomic(picture, content)
  return picture, table
