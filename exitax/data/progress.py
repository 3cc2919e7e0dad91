"""How long work shows itself: a function that wraps an iterable, so that callers can swap it."""

from __future__ import annotations

import importlib
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
  """A tqdm bar on standard error where that is a terminal and tqdm is installed, else nothing."""
  try:
    tqdm = importlib.import_module('tqdm')
  except ImportError:
    return iter(items)
  # disable=None is tqdm's word for "only on a terminal".
  return iter(tqdm.tqdm(items, total=total, desc=label, disable=None, leave=False))
