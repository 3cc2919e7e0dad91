"""How long work shows itself: a function that wraps an iterable, so that callers can swap it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar('Item')


class Progress(Protocol):
  """Passes items through and shows how far it is."""

  def __call__(self, items: Iterable[Item], *, total: int, label: str) -> Iterator[Item]:
    """The same items in the same order."""
    ...


def quiet(items: Iterable[Item], *, total: int, label: str) -> Iterator[Item]:
  """Shows nothing."""
  del total, label
  return iter(items)


def progress_bar(items: Iterable[Item], *, total: int, label: str) -> Iterator[Item]:
  """A bar on standard error where that is a terminal and rich is installed, else nothing."""
  if not sys.stderr.isatty():
    return iter(items)
  try:
    rich_console = importlib.import_module('rich.console')
    rich_progress = importlib.import_module('rich.progress')
  except ImportError:
    return iter(items)
  console = rich_console.Console(stderr=True)
  return iter(
    rich_progress.track(
      items, description=label, total=total or None, console=console, transient=True
    )
  )
