"""A stand-in for programming: components with bodies that depend on other components' bodies."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence

import numpy as np

from exitax.errors import UserError

_LETTERS = string.ascii_lowercase


@dataclasses.dataclass(frozen=True)
class Template:
  """Components A, B, ...: a body is the component's own letters, moved on by the ends of what it uses.

  A unit is `name body`. The prompt says `C:ab<AB`: component C has the letters `ab` and uses A and B; each letter
  of its body is the own one moved on by the sum of the last letters of the bodies of A and B, a = 0.

  Attributes:
    letters: of each component, all of one length.
    uses: of each component, earlier ones.
  """

  letters: tuple[str, ...]
  uses: tuple[tuple[int, ...], ...]

  @property
  def prompt(self) -> str:
    """The components."""
    parts = [
      f'{self.key(unit)}:{own}<{"".join(map(self.key, used))}'
      for unit, (own, used) in enumerate(zip(self.letters, self.uses, strict=True))
    ]
    return f'build {" ".join(parts)}\n'

  @property
  def num_units(self) -> int:
    """Components."""
    return len(self.letters)

  @property
  def key_length(self) -> int:
    """The name."""
    return 1

  @property
  def unit_length(self) -> int:
    """Name and body."""
    return 1 + len(self.letters[0])

  def key(self, unit: int) -> str:
    """An upper-case letter; bodies are lower-case."""
    return string.ascii_uppercase[unit]

  def ready(self, unit: int, written: Mapping[int, str]) -> bool:
    """Whether all that it uses is there."""
    return all(used in written for used in self.uses[unit])

  def text(self, unit: int, written: Mapping[int, str]) -> str:
    """Name and body."""
    # A letter that is none counts as the last one: wrong bodies have wrong heirs, and nothing fails.
    move = sum(_LETTERS.find(written[used][-1]) for used in self.uses[unit])
    body = ''.join(_LETTERS[(_LETTERS.index(char) + move) % 26] for char in self.letters[unit])
    return self.key(unit) + body

  def coverage(self, writings: Sequence[tuple[int, str]]) -> float:
    """Share of the components whose last writing is right."""
    right, last = self.solution(), dict(writings)
    return sum(last.get(unit) == text for unit, text in right.items()) / len(right)

  def solution(self) -> dict[int, str]:
    """The text of every unit."""
    written: dict[int, str] = {}
    for unit in range(self.num_units):
      written[unit] = self.text(unit, written)
    return written


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemplateTask:
  """Components at random.

  Attributes:
    num_components: 1 to 26.
    body_length: letters of a body.
    max_uses: components that one uses at most.
  """

  num_components: int = 12
  body_length: int = 3
  max_uses: int = 2
  name = 'template'

  def __post_init__(self) -> None:
    if not 1 <= self.num_components <= 26:
      raise UserError(f'num_components={self.num_components} is outside 1 to 26')
    if self.body_length < 1 or self.max_uses < 0:
      raise UserError(
        f'body_length={self.body_length} must be at least 1 and max_uses={self.max_uses} at least 0'
      )

  def problem(self, rng: np.random.Generator) -> Template:
    """Components, each of which uses some of those before it."""
    letters = tuple(
      ''.join(rng.choice(list(_LETTERS), self.body_length)) for _ in range(self.num_components)
    )
    uses = []
    for unit in range(self.num_components):
      count = rng.integers(0, min(self.max_uses, unit) + 1)
      uses.append(tuple(sorted(rng.choice(unit, count, replace=False).tolist()) if count else ()))
    return Template(letters, tuple(uses))
