"""What benchmarks found, as frozen data, and as JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exitax.checkpoint import write_bytes_atomic, write_json_atomic
from exitax.evaluate.facts import MachineFacts, ModelFacts

FORMAT = 1
JSON_FILE = 'tasks.json'
CSV_FILE = 'tasks.csv'
_NUMBERS = (int, float, np.number)
_COLUMNS = (
  *(
    'row',
    'layer',
    'threshold',
    'confidence',
    'layers_per_token',
    'task',
    'version',
    'num_fewshot',
  ),
  *('metric', 'filter', 'value', 'stderr', 'higher_is_better', 'samples'),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
  """One number of one task.

  Attributes:
    task: the task or group.
    name: of the metric, such as 'acc'.
    filter: what was made of answers before; 'none' is nothing.
    value: the number.
    stderr: its standard error; None where the harness gives none.
  """

  task: str
  name: str
  filter: str
  value: float
  stderr: float | None

  @property
  def title(self) -> str:
    """`acc`, or with a filter `exact_match (strict-match)`."""
    return self.name if self.filter == 'none' else f'{self.name} ({self.filter})'


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowResult:
  """One exit or policy on all tasks.

  Attributes:
    name: of the row.
    layer: layers of every token, for rows of one exit.
    threshold: for rows of a threshold.
    confidence: the measure it is compared with.
    policy: what wrote texts.
    layers_per_token: mean over all tokens that were scored or written.
    harness: what lm-evaluation-harness returns: `results`, `groups`, `versions`, ...
    seconds: what the row took; the first one scores for all.
  """

  name: str
  layer: int | None
  threshold: float | None
  confidence: str | None
  policy: str
  layers_per_token: float | None
  harness: Mapping[str, Any]
  seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskReport:
  """Everything that one run of benchmarks measured.

  Attributes:
    model: which model.
    machine: where it ran.
    tasks: names of tasks, groups and tags that were asked for.
    limit: documents per task at most.
    num_fewshot: solved examples before each question, where tasks leave it open.
    chat_template: whether questions were put as a chat.
    bootstrap: resamples behind standard errors without a formula.
    libraries: versions.
    rows: one per exit and policy.
    seconds: what all took.
  """

  model: ModelFacts
  machine: MachineFacts
  tasks: tuple[str, ...]
  limit: int | None
  num_fewshot: int | None
  chat_template: bool
  bootstrap: int
  libraries: Mapping[str, str]
  rows: tuple[RowResult, ...]
  seconds: float

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON values; a number that is none is null."""
    return _plain({'format': FORMAT, **dataclasses.asdict(self)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFiles:
  """Where a report was written."""

  json: Path
  csv: Path


def metrics_of(row: RowResult) -> list[Metric]:
  """All numbers of a row: those of groups stand with those of their tasks."""
  found = []
  results = {**row.harness['results'], **row.harness.get('groups', {})}
  for task, values in results.items():
    for key, value in values.items():
      name, comma, filter_name = key.partition(',')
      if not comma or name.endswith('_stderr') or not isinstance(value, _NUMBERS):
        continue
      stderr = values.get(f'{name}_stderr,{filter_name}')
      found.append(
        Metric(
          task=task,
          name=name,
          filter=filter_name,
          value=float(value),
          stderr=float(stderr) if isinstance(stderr, _NUMBERS) else None,
        )
      )
  return found


def write_task_report(report: TaskReport, directory: str | os.PathLike[str]) -> TaskFiles:
  """Writes `tasks.json` and `tasks.csv`, each whole or not at all.

  Raises:
    OSError: the directory is not writable or the disk is full; older files stay as they are.
  """
  files = TaskFiles(json=Path(directory) / JSON_FILE, csv=Path(directory) / CSV_FILE)
  write_json_atomic(files.json, report.to_dict())
  write_bytes_atomic(files.csv, to_csv(report).encode())
  return files


def to_csv(report: TaskReport) -> str:
  """One line per row, task, metric and filter, with a header; cells that do not apply are empty."""
  out = io.StringIO()
  writer = csv.DictWriter(out, _COLUMNS, restval='', lineterminator='\n')
  writer.writeheader()
  for row in report.rows:
    writer.writerows(_cells(row, metric) for metric in metrics_of(row))
  return out.getvalue()


def _cells(row: RowResult, metric: Metric) -> dict[str, Any]:
  def of_task(name: str) -> Any:
    return row.harness.get(name, {}).get(metric.task)

  cells = {
    'row': row.name,
    'layer': row.layer,
    'threshold': row.threshold,
    'confidence': row.confidence,
    'layers_per_token': row.layers_per_token,
    'task': metric.task,
    'version': of_task('versions'),
    'num_fewshot': of_task('n-shot'),
    'metric': metric.name,
    'filter': metric.filter,
    'value': metric.value,
    'stderr': metric.stderr,
    'higher_is_better': (of_task('higher_is_better') or {}).get(metric.name),
    'samples': (of_task('n-samples') or {}).get('effective'),
  }
  return {name: value for name, value in cells.items() if value is not None}


def _plain(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item) for item in value]
  if isinstance(value, np.generic):
    return _plain(value.item())
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value if isinstance(value, (str, int, bool, type(None))) else str(value)
