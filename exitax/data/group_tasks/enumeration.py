"""Enumeration: write every item of a list, none twice (Group Think, arXiv 2505.11107, section 4)."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence

import numpy as np

from exitax.data.group_tasks.units import ABORT, WAIT
from exitax.errors import UserError

# Single characters that stand for nothing else.
SYMBOLS = ''.join(
  char
  for char in string.ascii_letters + string.digits + string.punctuation
  if char not in ABORT + WAIT
)


_KEY_LENGTH = 2


@dataclasses.dataclass(frozen=True)
class Enumeration:
  """A list of items, each of which is a unit.

  Attributes:
    items: all of one length, different from each other in their first two characters.
  """

  items: tuple[str, ...]

  @property
  def prompt(self) -> str:
    """The list; single characters need nothing between them."""
    return f'list {("" if self.unit_length == 1 else " ").join(self.items)}\n'

  @property
  def num_units(self) -> int:
    """The items."""
    return len(self.items)

  @property
  def key_length(self) -> int:
    """Two characters, if items have as many."""
    return min(len(self.items[0]), _KEY_LENGTH)

  @property
  def unit_length(self) -> int:
    """An item's."""
    return len(self.items[0])

  def key(self, unit: int) -> str:
    """How the item begins."""
    return self.items[unit][:_KEY_LENGTH]

  def ready(self, unit: int, written: Mapping[int, str]) -> bool:
    """Always."""
    del unit, written
    return True

  def text(self, unit: int, written: Mapping[int, str]) -> str:
    """The item."""
    del written
    return self.items[unit]

  def coverage(self, writings: Sequence[tuple[int, str]]) -> float:
    """Share of the items that somebody wrote."""
    return len({unit for unit, _ in writings}) / len(self.items)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnumerationTask:
  """Lists of different items at random.

  Attributes:
    num_items: of a list.
    item_length: characters of an item; of longer ones thinkers see the beginnings.
    alphabet: different characters that items are made of; None is all there are. A model learns characters one by
      one: with fewer of them it learns to share sooner.
  """

  num_items: int = 32
  item_length: int = 1
  alphabet: int | None = None
  name = 'enumeration'

  def __post_init__(self) -> None:
    if self.item_length < 1:
      raise UserError(f'item_length={self.item_length} must be at least 1')
    if self.alphabet is not None and not 1 <= self.alphabet <= len(SYMBOLS):
      raise UserError(f'alphabet={self.alphabet} is outside 1 to {len(SYMBOLS)}')
    characters = len(self._characters)
    most = characters if self.item_length == 1 else characters**_KEY_LENGTH // 4
    if not 1 <= self.num_items <= most:
      raise UserError(
        f'num_items={self.num_items} of item_length={self.item_length} is outside 1 to {most}: longer items, '
        'and a larger alphabet, are more'
      )

  def problem(self, rng: np.random.Generator) -> Enumeration:
    """A list."""
    if self.item_length == 1:
      return Enumeration(tuple(rng.permutation(self._characters)[: self.num_items].tolist()))
    items: dict[str, str] = {}
    while len(items) < self.num_items:
      item = ''.join(rng.choice(self._characters, self.item_length))
      items.setdefault(item[:_KEY_LENGTH], item)
    return Enumeration(tuple(items.values()))

  @property
  def _characters(self) -> list[str]:
    return list(SYMBOLS[: self.alphabet])
