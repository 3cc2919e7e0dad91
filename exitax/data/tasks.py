"""Tasks and mixtures, by value or by name.

A `Task` is a named source; a `Mixture` takes rows from several tasks in fixed proportions. Both are
plain values that need no registry; registering one lets commands and gin files call it by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math

from exitax.data.sources import PythonLibrarySource, Source
from exitax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Task:
  """A named source of documents."""

  name: str
  source: Source


@dataclasses.dataclass(frozen=True)
class WeightedTask:
  """A task (or the name of a registered one) and its share of the rows, relative to the others."""

  task: Task | str
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Tasks drawn from in proportion to their weights, counted in packed rows.

  Raises UserError on construction for no tasks or a weight that is not positive and finite.
  """

  name: str
  tasks: tuple[WeightedTask, ...]

  def __post_init__(self) -> None:
    """Checks the weights."""
    object.__setattr__(self, 'tasks', tuple(self.tasks))
    if not self.tasks:
      raise UserError(f'mixture {self.name!r} has no tasks: give at least one WeightedTask')
    for item in self.tasks:
      if not (item.weight > 0 and math.isfinite(item.weight)):
        name = item.task if isinstance(item.task, str) else item.task.name
        raise UserError(
          f'mixture {self.name!r}: weight={item.weight} of task {name!r} must be above 0 and '
          'finite; leave a task out instead of giving it 0'
        )


class Registry:
  """Tasks and mixtures by name."""

  def __init__(self) -> None:
    """Starts empty."""
    self._entries: dict[str, Task | Mixture] = {}

  def register(self, entry: Task | Mixture) -> None:
    """Adds `entry` under its name.

    Raises:
      UserError: the name stands for something else already.
    """
    if self._entries.get(entry.name, entry) != entry:
      raise UserError(f'{entry.name!r} is registered already, as another task: choose a new name')
    self._entries[entry.name] = entry

  def get(self, name: str) -> Task | Mixture:
    """The task or mixture called `name`.

    Raises:
      UserError: there is none; the message lists the known names and the closest.
    """
    if name not in self._entries:
      close = difflib.get_close_matches(name, self._entries, n=1)
      hint = f'; did you mean {close[0]!r}?' if close else ''
      known = ', '.join(self.names()) or 'none'
      raise UserError(f'unknown task or mixture {name!r}{hint} (known: {known})')
    return self._entries[name]

  def names(self) -> list[str]:
    """All names, sorted."""
    return sorted(self._entries)

  def resolve(self, entry: str | Task | Mixture) -> Mixture:
    """`entry` as a mixture whose tasks are values; a single task becomes a mixture of one.

    Raises:
      UserError: a name is unknown, stands for a mixture inside a mixture, or occurs twice.
    """
    if isinstance(entry, str):
      entry = self.get(entry)
    if isinstance(entry, Task):
      return Mixture(name=entry.name, tasks=(WeightedTask(task=entry),))
    if not isinstance(entry, Mixture):
      raise UserError(f'mixture={entry!r} is no task or mixture: give one, or the name of one')
    items = tuple(
      WeightedTask(task=self._task(item.task, mixture=entry.name), weight=item.weight)
      for item in entry.tasks
    )
    names = [item.task.name for item in items if isinstance(item.task, Task)]
    for name in names:
      if names.count(name) > 1:
        raise UserError(f'mixture {entry.name!r} names task {name!r} twice: add the weights up')
    return Mixture(name=entry.name, tasks=items)

  def _task(self, task: Task | str, *, mixture: str) -> Task:
    found = self.get(task) if isinstance(task, str) else task
    if not isinstance(found, Task):
      raise UserError(f'mixture {mixture!r} contains the mixture {found.name!r}: name its tasks')
    return found


TASKS = Registry()
"""The registry of the commands, with the default corpus in it."""

register = TASKS.register
get = TASKS.get
resolve = TASKS.resolve

register(Task(name='python_library', source=PythonLibrarySource()))
