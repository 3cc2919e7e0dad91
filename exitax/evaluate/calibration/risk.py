"""Guarantees for a threshold from losses of examples. Pure NumPy, no model.

Learn then Test (arXiv 2110.01052), with fixed-sequence testing. For each threshold the hypothesis
"its risk exceeds the limit" is tested with a p-value; thresholds are tested in an order fixed beforehand,
from the most conservative on, and the first that is not rejected ends it. The *previous* one is
certified. With probability `confidence` over the draw of the examples its risk is below the limit.

Conformal risk control (arXiv 2208.02814): the *expected* loss of the next example is at most the
limit, on average over draws of the examples too. That is weaker (a single draw may do worse
about half of the time), and needs fewer examples.

Worked miniature, limit 0.1, confidence 0.9, 40 examples with losses of 0 or 1:

  threshold  mean loss  p-value
  1.0        0          0.9^40 = 0.015    rejected: safe
  0.9        0          0.015             rejected: safe, and certified
  0.8        0.05       0.513             not rejected: stop
  0.7        0          0.015             never looked at
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

# Sums of losses are compared after this much rounding.
_TINY = 1e-9
_MOST_EXAMPLES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class RiskRow:
  """What the examples say of one threshold.

  Attributes:
    threshold: in [0, 1].
    risk: mean loss of the examples. For conformal risk control, of the monotone losses.
    bound: Learn then Test: upper confidence bound of the risk, the smallest limit that this threshold would
      pass alone. Conformal risk control: `(n risk + 1) / (n + 1)`.
    p_value: of the hypothesis that the risk exceeds the limit; None for conformal risk control.
    passes: whether the threshold passes by itself.
  """

  threshold: float
  risk: float
  bound: float
  p_value: float | None
  passes: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RiskDecision:
  """The threshold that is certified, if one is.

  Attributes:
    threshold: the lowest one covered by the guarantee; None if none below the first is.
    rows: one per threshold, in the order given.
    examples: how many losses each had.
    examples_needed: only where nothing is certified: examples with which the second threshold would
      pass if its mean loss stayed as it is; None if no number up to a million would do.
    examples_at_no_loss: the least number with which a threshold without any loss passes.
  """

  threshold: float | None
  rows: tuple[RiskRow, ...]
  examples: int
  examples_needed: int | None
  examples_at_no_loss: int


def binomial_cdf(k: int, n: int, p: float) -> float:
  """P(X <= k) for X ~ Binomial(n, p), 0 < p < 1."""
  if k < 0:
    return 0.0
  if k >= n:
    return 1.0
  i = np.arange(k + 1)
  steps = np.log((n - i[:-1]) / (i[:-1] + 1.0)) + (math.log(p) - math.log1p(-p))
  terms = n * math.log1p(-p) + np.concatenate([[0.0], np.cumsum(steps)])
  top = float(np.max(terms))
  return min(1.0, math.exp(top) * float(np.sum(np.exp(terms - top))))


def bernoulli_kl(a: float, b: float) -> float:
  """KL(a || b) between Bernoulli variables in nats, 0 < b < 1."""
  first = a * math.log(a / b) if a > 0 else 0.0
  second = (1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0
  return first + second


def hoeffding_bentkus(risk: float, n: int, limit: float) -> float:
  """p-value of "the expected loss exceeds `limit`", for `n` losses in [0, 1] with mean `risk`.

  min(exp(-n KL(min(R, d) || d)), e BinCDF(ceil(n R); n, d)), at most 1: Bates et al.
  (arXiv 2101.02703), proposition 4. Losses need not be 0 or 1, only independent, or drawn without
  replacement.
  """
  hoeffding = math.exp(-n * bernoulli_kl(min(risk, limit), limit))
  bentkus = math.e * binomial_cdf(math.ceil(n * risk - _TINY), n, limit)
  return min(hoeffding, bentkus, 1.0)


def upper_bound(risk: float, n: int, *, confidence: float) -> float:
  """The smallest limit that a mean loss of `risk` over `n` examples passes, to 1e-6; 1 if none."""
  low, high = risk, 1.0
  while high - low > 1e-6:
    middle = (low + high) / 2
    if hoeffding_bentkus(risk, n, middle) > 1 - confidence:
      low = middle
    else:
      high = middle
  return high


def learn_then_test(
  losses: np.ndarray, thresholds: Sequence[float], *, limit: float, confidence: float
) -> RiskDecision:
  """Fixed-sequence testing down the thresholds; see the module.

  Args:
    losses: `[thresholds, examples]` in [0, 1].
    thresholds: in the order of testing, from conservative on; chosen without looking at `losses`.
    limit: of the expected loss, in (0, 1).
    confidence: probability that the guarantee holds, in (0, 1).

  Raises:
    ValueError: shapes or values out of range.
  """
  _check(losses, thresholds, limit)
  n = losses.shape[1]
  rows, certified, going = [], None, True
  for threshold, risk in zip(thresholds, losses.mean(axis=1, dtype=np.float64), strict=True):
    p_value = hoeffding_bentkus(float(risk), n, limit)
    passes = p_value <= 1 - confidence
    going = going and passes
    if going:
      certified = float(threshold)
    rows.append(
      RiskRow(
        threshold=float(threshold),
        risk=float(risk),
        bound=upper_bound(float(risk), n, confidence=confidence),
        p_value=p_value,
        passes=passes,
      )
    )

  def enough(risk: float) -> Callable[[int], bool]:
    return lambda n: hoeffding_bentkus(risk, n, limit) <= 1 - confidence

  return _decide(rows, certified, n, enough=enough)


def conformal_risk_control(
  losses: np.ndarray, thresholds: Sequence[float], *, limit: float
) -> RiskDecision:
  """The lowest threshold with `(n risk + 1) / (n + 1) <= limit`, in expectation; see the module.

  The method asks that each example's loss only grows as the threshold falls, which texts do not keep
  to: one that parted early may come back. So every loss is replaced by the largest among thresholds as
  high or higher. The result is monotone and never smaller, so what holds for it holds for the loss.

  Args:
    losses: `[thresholds, examples]` in [0, 1].
    thresholds: from high to low.
    limit: of the expected loss, in (0, 1).

  Raises:
    ValueError: shapes or values out of range.
  """
  _check(losses, thresholds, limit)
  n = losses.shape[1]
  monotone = np.maximum.accumulate(losses, axis=0)

  def bound(risk: float, n: int) -> float:
    return (n * risk + 1) / (n + 1)

  rows, certified = [], None
  for threshold, risk in zip(thresholds, monotone.mean(axis=1, dtype=np.float64), strict=True):
    passes = bound(float(risk), n) <= limit + _TINY
    if passes:
      certified = float(threshold)
    rows.append(
      RiskRow(
        threshold=float(threshold),
        risk=float(risk),
        bound=bound(float(risk), n),
        p_value=None,
        passes=passes,
      )
    )
  return _decide(rows, certified, n, enough=lambda risk: lambda n: bound(risk, n) <= limit + _TINY)


def least_examples(enough: Callable[[int], bool]) -> int | None:
  """A number of examples that is enough while one fewer is not; None above a million."""
  high = 1
  while not enough(high):
    high *= 2
    if high > _MOST_EXAMPLES:
      return None
  low = high // 2
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if enough(middle) else (middle, high)
  return high


def _decide(
  rows: Sequence[RiskRow],
  certified: float | None,
  n: int,
  *,
  enough: Callable[[float], Callable[[int], bool]],
) -> RiskDecision:
  """The first threshold by itself (full depth) is nothing to certify."""
  if certified == rows[0].threshold:
    certified = None
  at_no_loss = least_examples(enough(0.0))
  needed = None
  if certified is None:
    needed = least_examples(enough(rows[1].risk))
  return RiskDecision(
    threshold=certified,
    rows=tuple(rows),
    examples=n,
    examples_needed=needed,
    examples_at_no_loss=at_no_loss or _MOST_EXAMPLES,
  )


def _check(losses: np.ndarray, thresholds: Sequence[float], limit: float) -> None:
  if losses.ndim != 2 or losses.shape[0] != len(thresholds) or not losses.shape[1]:
    raise ValueError(f'losses {losses.shape} are not [{len(thresholds)} thresholds, examples]')
  if len(thresholds) < 2 or any(a <= b for a, b in itertools.pairwise(thresholds)):
    raise ValueError(f'thresholds {tuple(thresholds)} do not fall, or are fewer than 2')
  if not (np.all(losses >= 0) and np.all(losses <= 1)):
    raise ValueError('losses are not all in [0, 1]')
  if not 0 < limit < 1:
    raise ValueError(f'limit {limit} is outside (0, 1)')
