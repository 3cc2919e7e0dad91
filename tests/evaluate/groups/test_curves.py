"""Curves of coverage: exact scores at every length, theory, and intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitax.data.group_tasks import (
  Enumeration,
  FloydWarshallTask,
  Teacher,
  simulate,
  union_coverage,
)
from exitax.evaluate.groups import at_equal_tokens, ideal_coverage, independent_coverage, tokens_to
from exitax.evaluate.groups.curves import Bootstrap, score
from exitax.evaluate.groups.rollouts import Text


def texts(*written: str) -> tuple[Text, ...]:
  return tuple(Text(tuple(text)) for text in written)


def test_scores_of_every_length():
  problems = [Enumeration(('a', 'b', 'c', 'd')), Enumeration(('a', 'b', 'x', 'y'))]
  # The second group's texts end before the others.
  groups = [texts('abcd', 'aacc'), (Text(('x', '')), Text(('x', 'y', '')))]
  found = score(problems, groups, 5)
  np.testing.assert_array_equal(
    found.coverage, [[0, 0.25, 0.5, 0.75, 1, 1], [0, 0.25, 0.5, 0.5, 0.5, 0.5]]
  )
  np.testing.assert_array_equal(found.tokens, [0, 2, 4, (6 + 5) / 2, (8 + 5) / 2, (8 + 5) / 2])
  assert found.fair_share == 2
  # At two tokens each: a b, a a: two of four again; x, x y: one of three.
  assert found.duplicate_share == pytest.approx((2 / 4 + 1 / 3) / 2)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 50), stray=st.text('A0~!.3', max_size=12), thinkers=st.integers(1, 3))
def test_a_curve_is_the_coverage_of_every_beginning(seed, stray, thinkers):
  """Of distances, which a wrong row can make worse, among characters that belong to nothing."""
  rng = np.random.default_rng(seed)
  problem = FloydWarshallTask(num_nodes=3).problem(rng)
  written = simulate(problem, thinkers, rng, teacher=Teacher(max_length=40, slip=0.3))
  written[0] = stray + written[0]
  found = score([problem], [texts(*written)], 30)
  expected = [union_coverage(problem, written, length) for length in range(31)]
  np.testing.assert_array_equal(found.coverage[0], expected)


def test_a_token_may_be_several_characters():
  problems = [Enumeration(('abc', 'def'))]
  found = score(problems, [(Text(('ab', 'c', 'def')),)], 3)
  np.testing.assert_array_equal(found.coverage, [[0, 0, 0.5, 1]])


def test_theory_of_independent_texts_is_what_shuffled_lists_reach():
  rng = np.random.default_rng(0)
  items, thinkers = 12, 3
  orders = np.argsort(rng.random((4000, thinkers, items)), axis=-1)
  theory = independent_coverage(items, thinkers, items + 2)
  for length in (1, 5, 11):
    seen = [len(np.unique(order[:, :length])) / items for order in orders]
    assert abs(np.mean(seen) - theory[length]) < 4 * np.std(seen) / np.sqrt(len(seen))
  assert theory[-1] == theory[-3] == 1.0


def test_the_ideal_loses_what_is_chosen_at_the_same_step_only():
  curve = ideal_coverage(16, 4, 8, samples=4000)
  # First step: every item is missed by all four with probability (15/16)^4.
  assert curve[1] == pytest.approx(1 - (15 / 16) ** 4, abs=0.003)
  assert curve[4] == pytest.approx(0.844, abs=0.005)  # Another program's number.
  # Alone nothing is lost.
  np.testing.assert_allclose(ideal_coverage(16, 1, 16, samples=10), np.arange(17) / 16)


def test_intervals_of_differences_are_paired():
  rng = np.random.default_rng(0)
  hard = rng.normal(size=(400, 1))  # What problems share.
  ours, theirs = hard + 0.1, hard + rng.normal(scale=0.05, size=(400, 1))
  bootstrap = Bootstrap(400, resamples=2000)
  paired = bootstrap(ours - theirs)
  assert paired.low[0] > 0.09 and paired.high[0] < 0.11
  alone = bootstrap(ours)
  assert alone.low[0] < alone.mean[0] < alone.high[0]
  # 1.96 standard errors to either side.
  expected = 2 * 1.96 * np.std(ours) / np.sqrt(400)
  assert alone.high[0] - alone.low[0] == pytest.approx(expected, rel=0.1)


def test_reading_a_curve():
  curve, tokens = np.array([0, 0.4, 0.9, 1.0]), (0, 4, 8, 10)
  assert [tokens_to(curve, reach) for reach in (0.5, 0.9, 1.0)] == [2, 2, 3]
  assert tokens_to(curve[:2], 0.5) is None
  assert at_equal_tokens(tuple(curve), tokens, 6) == pytest.approx(0.65)
  assert at_equal_tokens(tuple(curve), tokens, 99) == 1.0
