"""Metrics on their way to files: one JSON object a line, and TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol

METRICS_FILE = 'metrics.jsonl'
TENSORBOARD_FOLDER = 'tensorboard'


class MetricsWriter(Protocol):
  """Takes named numbers."""

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Records numbers that belong to `step`."""
    ...

  def close(self) -> None:
    """Puts everything on disk."""
    ...


class FileMetricsWriter:
  """Writes `metrics.jsonl` and TensorBoard events below a model directory.

  A run that resumes at step S repeats the steps after S: their old lines are removed first, so the
  file reads as if the run had never been interrupted.

  Args:
    model_dir: the model directory.
    resumed_step: last step whose metrics stay.
  """

  def __init__(self, model_dir: str | os.PathLike[str], *, resumed_step: int) -> None:
    # Imported here: protobuf is slow to load, and only runs that write metrics need it.
    import tensorboardX

    directory = Path(model_dir)
    directory.mkdir(parents=True, exist_ok=True)
    self._path = directory / METRICS_FILE
    _drop_lines_after(self._path, resumed_step)
    self._file = open(self._path, 'a', encoding='utf-8')  # noqa: SIM115  (`close` closes it)
    self._events = tensorboardX.SummaryWriter(
      str(directory / TENSORBOARD_FOLDER), purge_step=resumed_step + 1
    )

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Appends one line and one set of events."""
    self._file.write(json.dumps({'step': step, **metrics}) + '\n')
    self._file.flush()
    for name, value in metrics.items():
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes both."""
    self._file.close()
    self._events.close()

  def __enter__(self) -> FileMetricsWriter:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self.close()


def read_metrics(model_dir: str | os.PathLike[str]) -> list[dict[str, float]]:
  """The lines of `metrics.jsonl`, in order; an unfinished last line is left out."""
  path = Path(model_dir) / METRICS_FILE
  if not path.exists():
    return []
  return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[str]:
  text = path.read_text(encoding='utf-8')
  return text[: text.rfind('\n') + 1].splitlines()


def _drop_lines_after(path: Path, step: int) -> None:
  if not path.exists():
    return
  kept = [line for line in _whole_lines(path) if json.loads(line)['step'] <= step]
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(line + '\n' for line in kept), encoding='utf-8')
  temporary.replace(path)
