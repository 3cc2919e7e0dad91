from __future__ import annotations

import numpy as np
import pytest

from exitax import decode
from exitax.evaluate.advice import (
  copied_work,
  deferred_work,
  geometric_tokens_per_round,
  run_survival,
  tokens_per_round,
)


def agrees(text: str) -> np.ndarray:
  return np.asarray([letter == 'A' for letter in text])


def test_the_miniature_of_the_module():
  text = agrees('AAAxAxxA')
  # AA+A, x, A+x, x, A..
  assert tokens_per_round([text], 2) == 8 / 5
  assert tokens_per_round([text], 1) == 8 / 5  # A+A, A+x, A+x, x, A..
  assert tokens_per_round([text], 7) == 8 / 4  # AAA+x, A+x, x, A..


def test_tokens_per_round_at_the_extremes():
  assert tokens_per_round([agrees('x' * 6)], 3) == 1
  assert tokens_per_round([agrees('A' * 8)], 3) == 4
  assert tokens_per_round([agrees('A' * 8), agrees('x' * 8)], 3) == 16 / 10
  assert tokens_per_round([], 3) == 0


@pytest.mark.parametrize('num_drafts', [1, 3, 7])
@pytest.mark.parametrize('share', [0.3, 0.8])
def test_independent_tokens_follow_the_formula(share, num_drafts):
  text = np.random.default_rng(0).random(200_000) < share
  counted = tokens_per_round([text], num_drafts)
  formula = geometric_tokens_per_round(share, num_drafts)
  assert counted == pytest.approx(formula, rel=0.01)
  assert formula == pytest.approx((1 - share ** (num_drafts + 1)) / (1 - share))
  assert float(decode.tokens_per_round(np.float32(share), num_drafts)) == pytest.approx(formula)


def test_survival_of_runs():
  # Runs of 3, 1 and 0 that ended, and one of 1 that was cut off.
  reach = run_survival([agrees('AAAxAxxA')], 4)
  # Length 0: four runs seen, one ended. 1: two seen beyond the cut one, one ended. 2: one, none. 3: one, ended.
  np.testing.assert_allclose(reach, [1, 3 / 4, 3 / 8, 3 / 8, 0])


def test_survival_counts_what_the_end_cuts_off():
  """Texts too short to see the ends of runs still give the survival of independent tokens."""
  rng = np.random.default_rng(0)
  texts = [rng.random(6) < 0.8 for _ in range(40_000)]
  np.testing.assert_allclose(run_survival(texts, 5), 0.8 ** np.arange(6), atol=0.01)
  np.testing.assert_allclose(run_survival([agrees('A' * 9)], 4), np.ones(5))
  np.testing.assert_allclose(run_survival([agrees('xxx')], 2), [1, 0, 0])


def test_deferred_work_of_the_miniature_in_decode():
  """Tokens 5, 6 and 7 of `exitax.decode.depth`'s miniature: exits after layers 2 and 4 of 6."""
  work = deferred_work([[0, 1, 2]], num_exits=2, capacity=4, buckets=(1, 4))
  # 0:2 thrice; 2:4 over tokens 5 and 6, then over 7; 4:6 over all three.
  assert work.passes == {(0, 1): 3, (1, 4): 1, (1, 1): 1, (2, 4): 1}
  assert work.heads == (3, 2, 1)
  assert work.tokens == 3
  assert work.copies == (0, 0, 0)


def test_deferred_work_fills_at_the_capacity():
  work = deferred_work([[0] * 9], num_exits=1, capacity=4, buckets=(1, 4))
  assert work.passes == {(0, 1): 9, (1, 4): 2}
  assert work.heads == (9, 0)


def test_deferred_work_is_what_decoding_does(loaded, held_out):
  """Passes of every segment, counted by the decoder itself along the same exits."""
  policy = decode.DeferredExit(threshold=0.4)
  plan = policy.plan(loaded.model.config)
  result = decode.generate(loaded.model, loaded.params, held_out, max_new_tokens=24, policy=policy)
  depths = list(loaded.model.config.depths)
  for prompt, alone in zip(held_out, result.completions, strict=True):
    (single,) = decode.generate(
      loaded.model, loaded.params, [prompt], max_new_tokens=24, policy=policy
    ).completions
    np.testing.assert_array_equal(single.tokens, alone.tokens)
    exits = [depths.index(layer) for layer in single.exit_layers]
    work = deferred_work(
      [exits], num_exits=2, capacity=plan.pending_capacity, buckets=plan.lane_buckets
    )
    passes = [sum(n for (s, _), n in work.passes.items() if s == i) for i in range(3)]
    assert passes == single.passes.tolist()


def test_copied_work():
  work = copied_work([[0, 1, 2, 2]], num_exits=2)
  assert work.passes == {(0, 1): 4, (1, 1): 3, (2, 1): 2}
  assert work.heads == (4, 3, 2)
  assert work.copies == (0, 1, 2)
