"""What an evaluation of groups found, as frozen data, and as JSON, CSV and a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from pathlib import Path
from typing import Any

from exitax.checkpoint import write_bytes_atomic, write_json_atomic
from exitax.evaluate.facts import MachineFacts, ModelFacts
from exitax.evaluate.report import ReportFiles

FORMAT = 1
CHAIN = 'chain_of_thought'
GROUP = 'group_think'
INDEPENDENT = 'independent'
MASK_OFF = 'cross_mask_off'
LAG = 'lag'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
  """A way of thinking: coverage after every number of tokens.

  Attributes:
    way: `chain_of_thought`, `group_think`, `independent`, `cross_mask_off` or `lag`.
    thinkers: N.
    lag: steps that the others' tokens are old when they are seen; None is never.
    coverage: after 0, 1, ... tokens of each thinker, the mean over problems.
    low: of its 95 % interval (bootstrap over problems).
    high: of its interval.
    total_tokens: that all thinkers had then written, the mean.
    theory: what the policy would reach that chooses at random among what it does not see written; for
      enumeration of single characters, else None.
    step_ms: milliseconds of a step; None where they were not taken.
    fair_share: tokens of each thinker that would do if the work was divided perfectly.
    duplicate_share: of the units written by then, those that had been written before.
    tokens_to: least tokens of each thinker that reach a coverage ('0.5', '0.9', '0.95'), or None.
  """

  way: str
  thinkers: int
  lag: int | None
  coverage: tuple[float, ...]
  low: tuple[float, ...]
  high: tuple[float, ...]
  total_tokens: tuple[float, ...]
  theory: tuple[float, ...] | None
  step_ms: float | None
  fair_share: int
  duplicate_share: float
  tokens_to: dict[str, int | None]

  @property
  def name(self) -> str:
    """`group_think 4`, `lag 2 4`; the number of thinkers last."""
    lag = f' {self.lag}' if self.way == LAG else ''
    return f'{self.way}{lag} {self.thinkers}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain:
  """Coverage of a group over that of as many independent texts, on the same problems.

  Attributes:
    thinkers: N.
    mean: after 0, 1, ... tokens of each thinker.
    low: of its 95 % interval (paired bootstrap).
    high: of its interval.
  """

  thinkers: int
  mean: tuple[float, ...]
  low: tuple[float, ...]
  high: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupReport:
  """All ways on one task.

  Attributes:
    model: which model.
    machine: where the times were taken.
    task: its name.
    settings: of the task.
    problems: how many, over all seeds.
    seeds: how many.
    tokens: of each thinker at most.
    curves: of every way, chain of thought first.
    gains: of each size, where independent texts were measured.
    seconds: what the evaluation took.
  """

  model: ModelFacts
  machine: MachineFacts
  task: str
  settings: str
  problems: int
  seeds: int
  tokens: int
  curves: tuple[Curve, ...]
  gains: tuple[Gain, ...]
  seconds: float

  def curve(self, way: str, thinkers: int, lag: int | None = None) -> Curve:
    """One of the curves; `lag` picks among those of the sweep.

    Raises:
      KeyError: it was not measured.
    """
    for curve in self.curves:
      if (curve.way, curve.thinkers) == (way, thinkers) and (way != LAG or curve.lag == lag):
        return curve
    wanted = f'{way} {lag}' if way == LAG else way
    raise KeyError(f'{wanted} {thinkers} was not measured')

  @property
  def sizes(self) -> tuple[int, ...]:
    """Numbers of thinkers of the groups."""
    return tuple(curve.thinkers for curve in self.curves if curve.way == GROUP)

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON values."""
    return {'format': FORMAT, **dataclasses.asdict(self)}


def write_group_report(report: GroupReport, directory: str | os.PathLike[str]) -> ReportFiles:
  """Writes `group_TASK.json`, `.csv` and `.png`, each whole or not at all.

  Raises:
    OSError: the directory is not writable or the disk is full; older files stay as they are.
  """
  from exitax.evaluate.groups.picture import draw_groups  # Late: matplotlib is slow to import.
  from exitax.evaluate.picture import to_png

  stem = Path(directory) / f'group_{report.task}'
  files = ReportFiles(
    json=stem.with_suffix('.json'), csv=stem.with_suffix('.csv'), picture=stem.with_suffix('.png')
  )
  picture = to_png(draw_groups(report))
  write_json_atomic(files.json, report.to_dict())
  write_bytes_atomic(files.csv, to_csv(report).encode())
  write_bytes_atomic(files.picture, picture)
  return files


def to_csv(report: GroupReport) -> str:
  """One line per way and number of tokens, with a header; cells that do not apply are empty."""
  columns = ('way', 'thinkers', 'lag', 'tokens', 'total_tokens', 'milliseconds')
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow((*columns, 'coverage', 'low', 'high', 'theory'))
  for curve in report.curves:
    lag = '' if curve.lag is None else curve.lag
    for step, coverage in enumerate(curve.coverage):
      time = '' if curve.step_ms is None else step * curve.step_ms
      theory = '' if curve.theory is None else curve.theory[step]
      writer.writerow(
        (
          *(curve.way, curve.thinkers, lag, step, curve.total_tokens[step], time),
          *(coverage, curve.low[step], curve.high[step], theory),
        )
      )
  return out.getvalue()
