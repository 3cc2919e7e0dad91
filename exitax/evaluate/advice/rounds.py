"""What decoding would do along a known text, counted without running it. Pure NumPy.

Worked miniature, an exit that agrees with the final layer on A and not on x, two drafts a round:

  text      A A A x A x x A        rounds      AA+A | x | A+x | x | A..
  runs      3, 1, 0 before the three x, and 1 that the end of the text cuts off
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


def run_survival(texts: Iterable[np.ndarray], longest: int) -> np.ndarray:
  """Share of runs of agreement that are at least 0, 1, ..., `longest` long, f64 `[longest + 1]`.

  What a round would accept that drafted without end. A run that its text's end cuts off counts as far
  as it was seen (Kaplan and Meier's estimate): to leave it out would drop the longest ones first.

  Args:
    texts: for each text, bool `[tokens]`: whether the exit agrees with the final layer.
    longest: length to look at last.
  """
  ended, cut = np.zeros(longest + 1, np.int64), np.zeros(longest + 1, np.int64)
  for agrees in texts:
    runs = np.diff(np.flatnonzero(~agrees), prepend=-1) - 1
    rest = len(agrees) - len(runs) - int(np.sum(runs))
    np.add.at(ended, runs[runs <= longest], 1)
    cut[min(rest, longest)] += rest > 0
    cut[longest] += np.sum(runs > longest)
  # Runs of which the token after `length` agreements was seen.
  seen = np.cumsum((ended + cut)[::-1])[::-1] - cut
  goes_on = 1 - ended / np.maximum(seen, 1)
  return np.concatenate([[1.0], np.cumprod(goes_on[:-1])])


def tokens_per_round(texts: Iterable[np.ndarray], num_drafts: int) -> float:
  """Mean tokens that a round of speculation gains along the texts.

  A round takes the agreeing tokens up to `num_drafts`, and one more that the final layer chooses. As
  speculation gives the text of full depth, this is what it would do, not an estimate; only the last
  round of each text is cut short. The formula for tokens that agree independently of each other with
  probability a is (1 - a^(d+1)) / (1 - a).
  """
  tokens = rounds = 0
  for agrees in texts:
    place = 0
    while place < len(agrees):
      ahead = agrees[place : place + num_drafts]
      place += (len(ahead) if np.all(ahead) else int(np.argmin(ahead))) + 1
      rounds += 1
    tokens += len(agrees)
  return tokens / max(rounds, 1)


def geometric_tokens_per_round(agreement: float, num_drafts: int) -> float:
  """(1 - a^(d+1)) / (1 - a): tokens per round if tokens agreed independently of each other."""
  return sum(agreement**i for i in range(num_drafts + 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """How often each part of the model runs.

  Attributes:
    tokens: tokens generated.
    passes: (segment of layers, lanes) -> passes.
    heads: per exit and at last for the final layer: scores computed.
    copies: per segment: tokens whose keys are made of an exit's stream.
  """

  tokens: int
  passes: Mapping[tuple[int, int], int]
  heads: tuple[int, ...]
  copies: tuple[int, ...]


def deferred_work(
  texts: Iterable[Sequence[int]], *, num_exits: int, capacity: int, buckets: Sequence[int]
) -> Work:
  """The work of deferred exits, one row at a time: see `exitax.decode.depth`.

  Args:
    texts: for each text, the exit that each token takes: 0 to `num_exits`, which is the final layer.
    num_exits: exits in use.
    capacity: tokens that may wait.
    buckets: numbers of lanes that deep segments are compiled for.
  """
  passes: collections.Counter[tuple[int, int]] = collections.Counter()
  heads = [0] * (num_exits + 1)
  tokens = 0
  for exits in texts:
    fill = [0] * (num_exits + 1)
    for taken in exits:
      tokens += 1
      for segment in range(num_exits + 1):
        undecided = taken >= segment
        if segment == 0:
          fill[0] += 1
          passes[0, 1] += 1
        elif undecided or fill[0] - fill[-1] >= capacity:
          waiting = fill[segment - 1] - fill[segment]
          if waiting:
            passes[segment, next(lanes for lanes in buckets if lanes >= waiting)] += 1
          fill[segment] = fill[segment - 1]
        if undecided:
          heads[segment] += 1
  return Work(tokens=tokens, passes=passes, heads=tuple(heads), copies=(0,) * (num_exits + 1))


def copied_work(texts: Iterable[Sequence[int]], *, num_exits: int) -> Work:
  """The work of copied states: tokens pass the segments up to their exit, and are copied to the rest."""
  passes: collections.Counter[tuple[int, int]] = collections.Counter()
  heads, copies = [0] * (num_exits + 1), [0] * (num_exits + 1)
  tokens = 0
  for exits in texts:
    for taken in exits:
      tokens += 1
      for segment in range(num_exits + 1):
        if taken >= segment:
          passes[segment, 1] += 1
          heads[segment] += 1
        else:
          copies[segment] += 1
  return Work(tokens=tokens, passes=passes, heads=tuple(heads), copies=tuple(copies))
