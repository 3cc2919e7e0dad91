"""Coverage against tokens: the union of a group's texts, at every length, with intervals over problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from exitax.data.group_tasks import Problem, Writing, duplicate_share, units_in
from exitax.evaluate.groups.rollouts import Text

REACHES = (0.5, 0.9, 0.95)
_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Scores:
  """A way of thinking about every problem.

  Attributes:
    coverage: f64 `[problems, tokens + 1]`, after so many tokens of each thinker.
    tokens: f64 `[tokens + 1]`, that all thinkers of a problem had then written, in the mean.
    duplicate_share: of the units written, those that had been written before; at the fair share.
    fair_share: tokens of each thinker that would do if the work was divided perfectly.
  """

  coverage: np.ndarray
  tokens: np.ndarray
  duplicate_share: float
  fair_share: int


def score(
  problems: Sequence[Problem], texts: Sequence[tuple[Text, ...]], num_tokens: int
) -> Scores:
  """Exact scores of the first 0 to `num_tokens` tokens of each text."""
  coverage = np.empty((len(problems), num_tokens + 1))
  tokens = np.zeros(num_tokens + 1)
  steps = np.arange(num_tokens + 1)
  fair = -(-problems[0].num_units * problems[0].unit_length // len(texts[0]))
  duplicates = []
  for row, (problem, group) in enumerate(zip(problems, texts, strict=True)):
    coverage[row] = _coverage(problem, group, num_tokens)
    tokens += sum(np.minimum(len(text.pieces), steps) for text in group)
    duplicates.append(duplicate_share(problem, [text.first(fair) for text in group]))
  return Scores(coverage, tokens / len(problems), float(np.mean(duplicates)), fair)


def _coverage(problem: Problem, group: Sequence[Text], num_tokens: int) -> np.ndarray:
  """`union_coverage` of all beginnings: what a text's beginning has written does not depend on how it goes on."""
  written: list[tuple[int, int, Writing]] = []  # (token that completed it, thinker, unit).
  for number, text in enumerate(group):
    ends = np.cumsum([len(piece) for piece in text.pieces])
    units = units_in(problem, ''.join(text.pieces))
    written += [(int(np.searchsorted(ends, item.end)) + 1, number, item) for item in units]
  curve = np.full(num_tokens + 1, problem.coverage([]))
  so_far: list[tuple[int, str]] = []
  for step, _, item in sorted(written, key=lambda entry: entry[:2]):
    so_far.append((item.unit, item.text))
    curve[step:] = problem.coverage(so_far)
  return curve


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
  """Means over problems and where they would be found again.

  Attributes:
    mean: f64 `[tokens + 1]`.
    low: f64 `[tokens + 1]`, of a 95 % interval.
    high: f64 `[tokens + 1]`.
  """

  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


class Bootstrap:
  """Percentile intervals; the same problems are drawn again for every way, so that differences are paired."""

  def __init__(self, num_problems: int, *, resamples: int, seed: int = 0) -> None:
    """Draws `num_problems` problems with replacement, `resamples` times."""
    rng = np.random.default_rng(seed)
    even = np.full(num_problems, 1 / num_problems)
    self._shares = rng.multinomial(num_problems, even, resamples) / num_problems

  def __call__(self, values: np.ndarray) -> Interval:
    """Of values f64 `[problems, ...]`; those of differences are paired."""
    means = self._shares @ values
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail), axis=0)
    return Interval(mean=values.mean(axis=0), low=low, high=high)


def tokens_to(curve: np.ndarray, coverage: float) -> int | None:
  """The least tokens of each thinker that reach a coverage; None if none do."""
  reached = np.flatnonzero(curve >= coverage)
  return int(reached[0]) if len(reached) else None


def at_equal_tokens(curve: Sequence[float], tokens: Sequence[float], total: float) -> float:
  """Coverage when all thinkers together have written `total` tokens, between two steps by proportion."""
  return float(np.interp(total, tokens, curve))
