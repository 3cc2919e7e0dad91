"""What good thinkers would write, a character at a time, each knowing only what it can see.

The teacher of thinker n at step s sees the prompt, its own text, and of each other text what the mask would
show the model there: a teacher that knew more would teach to guess.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from exitax.data.group_tasks.units import ABORT, WAIT, Problem, claimed_in, units_in


@dataclasses.dataclass(frozen=True)
class Seen:
  """How much of the others a thinker sees when it chooses a character.

  Attributes:
    lag: characters that are at least so many steps older than its newest one; 0 is Group Think's.
    by_rank: of the same step those of lower rank, all earlier ones; `lag` is not read.
  """

  lag: int = 0
  by_rank: bool = False

  def of(self, other: int, *, thinker: int, step: int) -> int:
    """Characters that thinker `thinker`, about to write number `step`, sees of thinker `other`."""
    if other == thinker:
      return step
    if self.by_rank:
      return step if other < thinker else max(step - 1, 0)
    return max(step - self.lag, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
  """A policy for problems of units: at random among what nobody is seen to be at, waiting if nothing is ready.

  Attributes:
    max_length: characters of a text at most.
    slip: probability of taking any unit that is ready, whether somebody is at it or not: collisions, which a model
      must have seen to get out of them.
    abort: probability, at each character, of giving up a unit that another has been seen at too.
    stall: probability of waiting although there is something to do.
  """

  max_length: int = 256
  slip: float = 0.0
  abort: float = 0.5
  stall: float = 0.0


def simulate(
  problem: Problem,
  num_thinkers: int,
  rng: np.random.Generator,
  *,
  seen: Seen = Seen(),
  teacher: Teacher = Teacher(),
) -> list[str]:
  """The texts of a group; one that ends before the others has nothing left to do that it can see.

  Args:
    problem: what to solve.
    num_thinkers: how many.
    rng: for every choice.
    seen: what each sees of the others.
    teacher: the policy.
  """
  reader = _Reader(problem)
  texts = [''] * num_thinkers
  plans = [''] * num_thinkers  # What is left of the unit that each is at.
  ended = [False] * num_thinkers
  for step in range(teacher.max_length):
    chosen: list[str | None] = []
    for thinker in range(num_thinkers):
      if ended[thinker]:
        chosen.append(None)
        continue
      views = [
        text[: seen.of(other, thinker=thinker, step=step)] for other, text in enumerate(texts)
      ]
      char, plans[thinker] = _next(reader, thinker, views, plans[thinker], rng, teacher)
      chosen.append(char)
    for thinker, char in enumerate(chosen):
      if char is None:
        ended[thinker] = True
      else:
        texts[thinker] += char
    if all(ended):
      break
  return texts


class _Reader:
  """Finds units in texts; several thinkers look at the same beginnings, which are read once."""

  def __init__(self, problem: Problem) -> None:
    self.problem = problem
    self.written = functools.cache(lambda text: units_in(problem, text))
    self.claimed = functools.cache(lambda text: frozenset(claimed_in(problem, text)))


def _next(
  reader: _Reader,
  thinker: int,
  views: Sequence[str],
  plan: str,
  rng: np.random.Generator,
  teacher: Teacher,
) -> tuple[str | None, str]:
  """A thinker's next character (None ends its text), and what is left of its unit."""
  problem = reader.problem
  others = [view for other, view in enumerate(views) if other != thinker]
  if plan:
    if _is_taken(reader, views[thinker], others) and rng.random() < teacher.abort:
      return ABORT, ''
    return plan[0], plan[1:]
  written = {item.unit: item.text for view in views for item in reader.written(view)}
  open_units = set(range(problem.num_units)) - set(written)
  if not open_units:
    return None, ''
  taken = frozenset().union(*map(reader.claimed, others))
  free = sorted(open_units - taken)
  if rng.random() < teacher.slip:
    free = sorted(open_units)
  ready = [unit for unit in free if problem.ready(unit, written)]
  if not ready:
    # Others are at all that is left, or at what it builds on.
    waits = [unit for unit in free if not problem.ready(unit, written)]
    return (WAIT if waits else None), ''
  if rng.random() < teacher.stall:
    return WAIT, ''
  text = problem.text(int(rng.choice(ready)), written)
  return text[0], text[1:]


def _is_taken(reader: _Reader, own: str, others: Sequence[str]) -> bool:
  """Whether the unit that the own text has begun is seen in another text."""
  current = reader.claimed(own) - {item.unit for item in reader.written(own)}
  return any(current & reader.claimed(other) for other in others)
