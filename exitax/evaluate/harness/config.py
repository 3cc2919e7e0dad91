"""Which benchmarks are run, as frozen data that is checked when made."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from exitax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
  """Tasks of lm-evaluation-harness.

  Attributes:
    tasks: names of tasks, groups or tags; `*` stands for anything.
    task_path: a folder with YAML tasks of one's own; their names win over the library's.
    limit: documents per task at most, the first ones; None takes all.
    num_fewshot: solved examples before each question; None leaves it to the task.
    batch_size: texts that are scored or written at once.
    bootstrap: resamples behind a standard error that has no formula, such as perplexity's.

  Raises:
    UserError: no task, a folder without YAML, or a number out of range.
  """

  tasks: tuple[str, ...]
  task_path: str | None = None
  limit: int | None = None
  num_fewshot: int | None = None
  batch_size: int = 16
  # The library's own 100,000 take minutes per metric; a thousand give the error to about 2 %.
  bootstrap: int = 1000

  def __post_init__(self) -> None:
    if not self.tasks or not all(self.tasks):
      raise UserError('--tasks has an empty name: write --tasks=hellaswag,arc_easy')
    for name, lowest in (('limit', 1), ('num_fewshot', 0), ('batch_size', 1), ('bootstrap', 0)):
      value = getattr(self, name)
      if value is not None and value < lowest:
        raise UserError(f'{name}={value} must be at least {lowest}')
    if self.task_path is not None:
      _check_folder(Path(self.task_path))


def _check_folder(folder: Path) -> None:
  if not folder.is_dir():
    raise UserError(f'task_path={folder} is no folder: give one that holds YAML tasks')
  if not any(folder.rglob('*.yaml')):
    raise UserError(
      f'task_path={folder} has no .yaml file: write a task of lm-evaluation-harness there'
    )
