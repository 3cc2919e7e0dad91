"""Problems that a group can share: units of work, each a few characters, some of which build on others.

A unit's text begins with its key, so that whoever sees the key knows that somebody is at it. What the
group has achieved is counted from the union of its texts, exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

WAIT = '~'  # A thinker with nothing to do yet.
ABORT = '!'  # Ends a unit that is given up.


class Problem(Protocol):
  """One instance of a task.

  Attributes:
    prompt: what all thinkers read.
    num_units: units of work.
    key_length: characters of a unit's text that name it; no two units begin with the same.
    unit_length: characters of a unit's text, the key's included.
  """

  @property
  def prompt(self) -> str: ...

  @property
  def num_units(self) -> int: ...

  @property
  def key_length(self) -> int: ...

  @property
  def unit_length(self) -> int: ...

  def key(self, unit: int) -> str:
    """What its text begins with."""
    ...

  def ready(self, unit: int, written: Mapping[int, str]) -> bool:
    """Whether all that it builds on is among the texts of units that are `written`."""
    ...

  def text(self, unit: int, written: Mapping[int, str]) -> str:
    """Its text, given those that it builds on."""
    ...

  def coverage(self, writings: Sequence[tuple[int, str]]) -> float:
    """Share of the solution that is right, in [0, 1], after units were written in this order."""
    ...


class Task(Protocol):
  """A family of problems."""

  @property
  def name(self) -> str: ...

  def problem(self, rng: np.random.Generator) -> Problem:
    """A problem at random; the same for the same state of `rng`."""
    ...


@dataclasses.dataclass(frozen=True)
class Writing:
  """A unit that a text contains.

  Attributes:
    unit: which.
    text: all of it.
    end: characters of the thinker's text up to its end.
  """

  unit: int
  text: str
  end: int


def units_in(problem: Problem, text: str) -> list[Writing]:
  """The units that a text has written to the end, in its order.

  Waiting is skipped; a unit that was given up, and characters that begin no unit, give nothing.
  """
  units = _units_by_key(problem)
  found, at = [], 0
  while at + problem.unit_length <= len(text):
    piece = text[at : at + problem.unit_length]
    unit = units.get(piece[: problem.key_length])
    if unit is None or ABORT in piece:
      # After what was given up the next unit begins; else the text is read from the next character.
      at += piece.index(ABORT) + 1 if unit is not None else 1
      continue
    at += problem.unit_length
    found.append(Writing(unit, piece, at))
  return found


def claimed_in(problem: Problem, text: str) -> set[int]:
  """Units that a text has begun, or written, and not given up."""
  units = _units_by_key(problem)
  claimed, at = set(), 0
  while at + problem.key_length <= len(text):
    piece = text[at : at + problem.unit_length]
    unit = units.get(piece[: problem.key_length])
    if unit is None or ABORT in piece:
      at += piece.index(ABORT) + 1 if unit is not None else 1
      continue
    claimed.add(unit)
    at += problem.unit_length
  return claimed


@functools.lru_cache(maxsize=8)
def _units_by_key(problem: Problem) -> dict[str, int]:
  """Texts are read at every step of a simulation: keys are made once per problem."""
  return {problem.key(unit): unit for unit in range(problem.num_units)}


def union_coverage(problem: Problem, texts: Sequence[str], length: int | None = None) -> float:
  """What a group has achieved with the first `length` characters of each of its texts.

  Of a unit that was written twice the last writing counts; texts are read a character at a time, all at
  once, as they were written.
  """
  writings = [
    (item.end, number, item)
    for number, text in enumerate(texts)
    for item in units_in(problem, text[:length])
  ]
  ordered = sorted(writings, key=lambda entry: entry[:2])
  return problem.coverage([(item.unit, item.text) for _, _, item in ordered])


def duplicate_share(problem: Problem, texts: Sequence[str]) -> float:
  """Share of the written units that had been written before, by anybody; 0 without any."""
  units = [item.unit for text in texts for item in units_in(problem, text)]
  return 1 - len(set(units)) / len(units) if units else 0.0
