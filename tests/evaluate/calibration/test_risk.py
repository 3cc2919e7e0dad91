from __future__ import annotations

import math

import numpy as np
import pytest

from exitax.evaluate.calibration import (
  conformal_risk_control,
  hoeffding_bentkus,
  learn_then_test,
  upper_bound,
)
from exitax.evaluate.calibration.risk import bernoulli_kl, binomial_cdf, least_examples

THRESHOLDS = (1.0, 0.9, 0.8, 0.7)


def losses_of(*failures: int, examples: int = 40) -> np.ndarray:
  """Losses of 0 or 1 with so many ones at each threshold."""
  return np.asarray([[1.0] * count + [0.0] * (examples - count) for count in failures])


# Values worked out by hand.


def test_binomial_cdf_of_three_coins():
  assert [binomial_cdf(k, 3, 0.5) for k in (-1, 0, 1, 2, 3)] == pytest.approx(
    [0, 1 / 8, 4 / 8, 7 / 8, 1]
  )
  assert binomial_cdf(1, 4, 0.1) == pytest.approx(0.9**4 + 4 * 0.1 * 0.9**3)


def test_binomial_cdf_keeps_its_digits():
  exact = sum(math.comb(2000, k) * 0.02**k * 0.98 ** (2000 - k) for k in range(31))
  assert binomial_cdf(30, 2000, 0.02) == pytest.approx(exact, rel=1e-10)


def test_divergence():
  assert bernoulli_kl(0.0, 0.1) == pytest.approx(-math.log(0.9))
  assert bernoulli_kl(0.1, 0.1) == 0
  assert bernoulli_kl(0.05, 0.1) == pytest.approx(
    0.05 * math.log(0.5) + 0.95 * math.log(0.95 / 0.9)
  )


def test_p_values():
  # Without losses Hoeffding's term is (1 - d)^n, which Bentkus's exceeds by the factor e.
  assert hoeffding_bentkus(0.0, 40, 0.1) == pytest.approx(0.9**40)
  assert hoeffding_bentkus(0.05, 40, 0.1) == pytest.approx(math.exp(-40 * bernoulli_kl(0.05, 0.1)))
  assert hoeffding_bentkus(0.1, 40, 0.1) == 1
  assert hoeffding_bentkus(0.5, 40, 0.1) == 1
  # Bentkus's term is the smaller one somewhere: 2 losses of 500 at 0.02.
  tail = sum(math.comb(500, k) * 0.02**k * 0.98 ** (500 - k) for k in range(3))
  kl = math.exp(-500 * bernoulli_kl(0.004, 0.02))
  assert hoeffding_bentkus(0.004, 500, 0.02) == pytest.approx(min(math.e * tail, kl))
  # A sum of 3 whose mean is rounded upwards still has a ceiling of 3.
  assert (
    hoeffding_bentkus(np.nextafter(3 / 7, 1), 7, 0.9) <= math.e * binomial_cdf(3, 7, 0.9) + 1e-12
  )


def test_p_values_are_monotone():
  in_risk = [hoeffding_bentkus(k / 50, 50, 0.3) for k in range(51)]
  assert np.all(np.diff(in_risk) >= 0)
  in_limit = [hoeffding_bentkus(0.1, 50, limit) for limit in np.linspace(0.02, 0.98, 60)]
  assert np.all(np.diff(in_limit) <= 1e-15)


def test_the_bound_is_the_limit_that_just_passes():
  for risk, n in ((0.0, 149), (0.01, 300), (0.3, 50)):
    bound = upper_bound(risk, n, confidence=0.95)
    assert risk < bound < 1
    assert hoeffding_bentkus(risk, n, bound) <= 0.05
    assert hoeffding_bentkus(risk, n, bound - 2e-6) > 0.05


# Learn then Test.


def test_the_miniature_of_the_module():
  decision = learn_then_test(losses_of(0, 0, 2, 0), THRESHOLDS, limit=0.1, confidence=0.9)
  assert [row.p_value for row in decision.rows] == pytest.approx(
    [0.0148, 0.0148, 0.513, 0.0148], abs=5e-4
  )
  assert decision.threshold == 0.9


def test_the_first_failing_threshold_is_not_the_one_returned():
  """A known fault of implementations: they return the threshold at which the descent stopped."""
  decision = learn_then_test(losses_of(0, 0, 0, 20), THRESHOLDS, limit=0.1, confidence=0.9)
  assert decision.threshold == 0.8
  assert [row.passes for row in decision.rows] == [True, True, True, False]


def test_what_passes_after_a_failure_is_never_certified():
  decision = learn_then_test(losses_of(0, 20, 0, 0), THRESHOLDS, limit=0.1, confidence=0.9)
  assert decision.threshold is None
  assert decision.rows[2].passes


def test_all_thresholds_may_pass():
  decision = learn_then_test(losses_of(0, 0, 0, 0), THRESHOLDS, limit=0.1, confidence=0.9)
  assert decision.threshold == 0.7
  assert decision.examples_needed is None


def test_a_refusal_says_how_many_examples_are_missing():
  few = learn_then_test(
    losses_of(0, 0, 0, 0, examples=100), THRESHOLDS, limit=0.02, confidence=0.95
  )
  assert few.threshold is None
  # 0.98^149 <= 0.05 < 0.98^148.
  assert few.examples_at_no_loss == few.examples_needed == 149
  some = learn_then_test(
    losses_of(0, 1, 1, 1, examples=100), THRESHOLDS, limit=0.02, confidence=0.95
  )
  assert some.threshold is None
  needed = some.examples_needed
  assert needed is not None
  assert hoeffding_bentkus(0.01, needed, 0.02) <= 0.05 < hoeffding_bentkus(0.01, needed - 1, 0.02)
  many = learn_then_test(
    losses_of(0, 3, 3, 3, examples=100), THRESHOLDS, limit=0.02, confidence=0.95
  )
  assert many.threshold is None
  assert many.examples_needed is None  # More examples of a risk above the limit prove nothing.


def test_least_examples():
  assert least_examples(lambda n: n >= 1) == 1
  assert least_examples(lambda n: n >= 777) == 777
  assert least_examples(lambda n: False) is None


# Conformal risk control.


def test_conformal_bound():
  decision = conformal_risk_control(losses_of(0, 1, 3, 9, examples=39), THRESHOLDS, limit=0.1)
  # (39 * 1/39 + 1) / 40 = 0.05, then 4/40 = 0.1, then 10/40.
  assert [row.bound for row in decision.rows] == pytest.approx([1 / 40, 2 / 40, 4 / 40, 10 / 40])
  assert decision.threshold == 0.8
  assert all(row.p_value is None for row in decision.rows)


def test_conformal_losses_are_made_monotone():
  """Example 0 parts at 0.9 and comes back at 0.8: it counts there too."""
  losses = np.zeros((4, 30))
  losses[1, 0] = 1.0
  losses[2, 1] = 0.5
  decision = conformal_risk_control(losses, THRESHOLDS, limit=0.5)
  assert [row.risk * 30 for row in decision.rows] == pytest.approx([0, 1, 1.5, 1.5])


def test_conformal_refusal():
  decision = conformal_risk_control(losses_of(0, 0, 0, 0, examples=10), THRESHOLDS, limit=0.02)
  assert decision.threshold is None
  assert decision.examples_needed == decision.examples_at_no_loss == 49  # 1 / 50 <= 0.02.


@pytest.mark.parametrize(
  ('losses', 'thresholds', 'limit'),
  [
    (np.zeros((2, 3)), (1.0, 0.5, 0.1), 0.1),
    (np.zeros((2, 3)), (0.5, 1.0), 0.1),
    (np.zeros((1, 3)), (1.0,), 0.1),
    (np.full((2, 3), 1.5), (1.0, 0.5), 0.1),
    (np.full((2, 3), np.nan), (1.0, 0.5), 0.1),
    (np.zeros((2, 3)), (1.0, 0.5), 1.0),
  ],
)
def test_what_makes_no_sense_is_refused(losses, thresholds, limit):
  with pytest.raises(ValueError):
    learn_then_test(losses, thresholds, limit=limit, confidence=0.9)


# The guarantee itself.

RESPLITS, EXAMPLES, LIMIT = 600, 300, 0.1
FINE, COARSE = tuple(np.linspace(1, 0, 21)), tuple(np.linspace(1, 0, 5))


def population_at(thresholds: tuple[float, ...]) -> np.ndarray:
  """Losses `[thresholds, 20000]`: fractions that depend on a difficulty, and risk through the limit."""
  rng = np.random.default_rng(0)
  difficulty = rng.random(20_000)
  return np.asarray(
    [
      np.where(difficulty > 1 - 0.4 * (1 - t), rng.beta(8, 2, difficulty.size), 0.0)
      for t in thresholds
    ]
  )


def violations(thresholds: tuple[float, ...], choose) -> float:
  """Share of resplits in which the chosen threshold's risk in the population is above the limit."""
  population = population_at(thresholds)
  risks = population.mean(axis=1)
  assert risks[1] < LIMIT < risks[-1]
  rng = np.random.default_rng(1)
  broken = 0
  for _ in range(RESPLITS):
    sample = population[:, rng.choice(population.shape[1], EXAMPLES, replace=False)]
    index = choose(sample, thresholds)
    broken += index is not None and bool(risks[index] > LIMIT)
  return broken / RESPLITS


def certified(sample: np.ndarray, thresholds: tuple[float, ...]) -> int | None:
  found = learn_then_test(sample, thresholds, limit=LIMIT, confidence=0.9).threshold
  return None if found is None else thresholds.index(found)


def uncorrected(sample: np.ndarray, thresholds: tuple[float, ...]) -> int | None:
  """Wrong on purpose: the lowest threshold whose measured mean is within the limit."""
  del thresholds
  return int(np.flatnonzero(sample.mean(axis=1) <= LIMIT)[-1])


def first_failing(sample: np.ndarray, thresholds: tuple[float, ...]) -> int | None:
  """Wrong on purpose: the threshold at which the descent stopped."""
  rows = learn_then_test(sample, thresholds, limit=LIMIT, confidence=0.9).rows
  return next((i for i, row in enumerate(rows) if not row.passes), None)


@pytest.mark.parametrize('thresholds', [FINE, COARSE], ids=['fine', 'coarse'])
def test_coverage_over_resplits(thresholds):
  assert violations(thresholds, certified) <= 0.1


def test_the_guarantee_is_not_kept_by_refusing():
  chosen = certified(population_at(FINE)[:, :EXAMPLES], FINE)
  assert chosen is not None
  assert chosen >= 3


@pytest.mark.parametrize(('thresholds', 'wrong'), [(FINE, uncorrected), (COARSE, first_failing)])
def test_wrong_rules_break_the_guarantee(thresholds, wrong):
  """So that the test above could fail."""
  assert violations(thresholds, wrong) > 0.2


def test_conformal_expectation_over_resplits():
  """The mean risk over resplits is within the limit, while single resplits exceed it."""
  population = population_at(FINE)
  monotone = np.maximum.accumulate(population, axis=0)
  risks = dict(zip(FINE, monotone.mean(axis=1), strict=True))
  rng = np.random.default_rng(2)
  drawn = []
  for _ in range(500):
    sample = population[:, rng.choice(population.shape[1], EXAMPLES, replace=False)]
    threshold = conformal_risk_control(sample, FINE, limit=LIMIT).threshold
    assert threshold is not None
    drawn.append(risks[threshold])
  assert np.mean(drawn) <= LIMIT
  assert np.mean(np.asarray(drawn) > LIMIT) > 0.1
