"""Tasks of lm-evaluation-harness: found by name, loaded with their data."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from exitax.data import Progress, quiet
from exitax.errors import UserError
from exitax.evaluate.harness.config import TaskConfig
from exitax.evaluate.harness.library import import_library

Result = TypeVar('Result')

# The library's own, so that the same examples are drawn as by `lm_eval`.
_SEED, _OTHER_SEED = 0, 1234


@dataclasses.dataclass(frozen=True)
class OpenTasks:
  """Tasks with their data, ready to be run again and again.

  Attributes:
    config: what was asked for.
    names: the tasks, groups and tags that it names.
    loaded: what the library's `TaskManager.load` returns.
  """

  config: TaskConfig
  names: tuple[str, ...]
  loaded: Any

  def reset(self) -> None:
    """Makes the tasks draw the same solved examples again."""
    for task in self.loaded['tasks'].values():
      task.set_fewshot_seed(seed=_OTHER_SEED)


def open_tasks(config: TaskConfig, *, progress: Progress = quiet) -> OpenTasks:
  """Finds tasks and loads their data, from the network unless they are in a cache or on disk.

  Args:
    config: which.
    progress: shows the two steps that take long.

  Raises:
    UserError: the library is missing, a name is unknown, a task cannot be loaded or cannot be run here.
  """
  manager, names = _find(config, progress=progress)
  # Some tasks shuffle their documents with the global generators.
  random.seed(_SEED)
  np.random.seed(_OTHER_SEED)  # noqa: NPY002  (what tasks use)
  try:
    loaded = _shown(lambda: manager.load(list(names)), progress, label='loading tasks')
  except UserError:
    raise
  except Exception as error:  # Data sets and tasks fail in ways of their own.
    reason = (str(error).strip().splitlines() or [''])[0]
    raise UserError(
      f'tasks {", ".join(names)} cannot be loaded ({type(error).__name__}: {reason}): a data set may '
      'need the network once, or a package of its own'
    ) from error
  for name, task in loaded['tasks'].items():
    _check_runs_here(name, task)
    _set_fewshot(task, config.num_fewshot)
  return OpenTasks(config=config, names=names, loaded=loaded)


def _find(config: TaskConfig, *, progress: Progress) -> tuple[Any, tuple[str, ...]]:
  """A manager that knows all names, and the names with patterns filled in."""
  manager_class = import_library('lm_eval.tasks').TaskManager
  if config.task_path is not None:
    # The library's own tasks take seconds to list: only where they are asked for.
    own = manager_class(include_path=config.task_path, include_defaults=False)
    names, missing = _matches(own.all_tasks, config.tasks)
    if not missing and set(names) <= set(own.all_subtasks):
      return own, names
  every = _shown(
    lambda: manager_class(include_path=config.task_path), progress, label='looking for tasks'
  )
  names, missing = _matches(every.all_tasks, config.tasks)
  if missing:
    near = difflib.get_close_matches(missing[0], every.all_tasks, n=3)
    hint = f'did you mean {", ".join(near)}? ' if near else ''
    raise UserError(
      f'no task {missing[0]!r}: {hint}`lm_eval ls tasks` lists all, --task_path=FOLDER adds your own'
    )
  return every, names


def _matches(
  known: Sequence[str], patterns: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The known names that patterns stand for, each once, and the patterns that stand for none."""
  found: dict[str, None] = {}
  missing = []
  for pattern in patterns:
    names = fnmatch.filter(known, pattern)
    found |= dict.fromkeys(names)
    if not names:
      missing.append(pattern)
  return tuple(found), tuple(missing)


def _check_runs_here(name: str, task: Any) -> None:
  if getattr(task, 'UNSAFE_CODE', False):
    raise UserError(f'{name} runs code that the model writes, which exitax does not: leave it out')
  if getattr(task, 'MULTIMODAL', False):
    raise UserError(f'{name} shows pictures or sound to the model, which reads text: leave it out')


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
  """As the library does: a task that says 0 means it, one that says nothing gets 0."""
  own = task.get_config('num_fewshot')
  if num_fewshot is not None and own != 0:
    task.set_config(key='num_fewshot', value=num_fewshot)
  elif own is None:
    task.set_config(key='num_fewshot', value=0)


def _shown(work: Callable[[], Result], progress: Progress, *, label: str) -> Result:
  """The result of one long step, with its name on the screen meanwhile."""
  (result,) = [work() for _ in progress([None], total=1, label=label)]
  return result
