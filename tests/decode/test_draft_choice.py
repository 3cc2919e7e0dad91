import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from exitax.decode.draft_choice import (
  DraftCosts,
  choose_draft,
  draft_buckets,
  estimate_costs,
  no_stats,
  tokens_per_round,
)
from exitax.models import ExitConfig, ModelConfig

# Exits after layers 2 and 4 of 8; heads of 0.5; verification of 4 and 8 lanes.
COSTS = DraftCosts(
  rounds=tuple(
    tuple((d + 1) * layer + 0.5 * d + (7.0 if d < 4 else 8.0) - layer / 2 for d in range(1, 8))
    for layer in (2.0, 4.0)
  ),
  plain=8.5,
)


def _choice(agreed, tried, *, active=None, prior_weight=0.0):
  agreed, tried = np.atleast_2d(agreed), np.atleast_2d(tried)
  stats = dataclasses.replace(
    no_stats(len(agreed), 2), agreed=jnp.asarray(agreed), tried=jnp.asarray(tried)
  )
  active = np.ones(len(agreed), bool) if active is None else np.asarray(active)
  chosen = choose_draft(stats, active, COSTS, prior=0.5, prior_weight=prior_weight)
  return tuple(int(x) for x in chosen)


def test_tokens_per_round_of_a_worked_example():
  # a = 0.5, d = 2: 1 + 0.5 + 0.25.
  np.testing.assert_allclose(tokens_per_round(jnp.float32(0.5), 2), 1.75)
  np.testing.assert_allclose(tokens_per_round(jnp.float32(1.0), 3), 4.0)
  np.testing.assert_allclose(tokens_per_round(jnp.float32(0.0), 3), 1.0)


def test_the_choice_is_the_best_of_all():
  for agreement in ((0.95, 0.99), (0.6, 0.97), (0.8, 0.8), (0.3, 0.9)):
    rates = {
      (j, d): float(tokens_per_round(jnp.float32(agreement[j]), d)) / COSTS.rounds[j][d - 1]
      for j in range(2)
      for d in range(1, 8)
    }
    best = max(rates, key=rates.__getitem__)
    expected = best if rates[best] > 1 / COSTS.plain else (2, 0)
    assert _choice(np.float32(agreement) * 50, np.full(2, 50.0)) == expected


def test_exits_that_never_agree_are_not_used():
  assert _choice([0.0, 0.0], [10.0, 10.0]) == (2, 0)


def test_an_untried_exit_is_given_the_benefit_of_the_doubt():
  assert _choice([0.0, 0.0], [10.0, 0.0], prior_weight=1.0)[0] != 0


def test_rows_that_are_done_have_no_say():
  good, bad = [9.9, 0.0], [0.0, 0.0]
  tried = [[10.0, 10.0], [10.0, 10.0]]
  assert _choice([good, bad], tried, active=[True, False])[0] == 0
  assert _choice([good, bad], tried, active=[False, True]) == (2, 0)


@pytest.mark.parametrize(
  ('drafts', 'buckets'), [(1, (4,)), (3, (4,)), (4, (4, 8)), (7, (4, 8)), (8, (4, 8, 16))]
)
def test_buckets_hold_the_drafts_and_the_newest_token(drafts, buckets):
  assert draft_buckets(drafts) == buckets


def test_estimated_costs_grow_with_layers_and_lanes():
  config = ModelConfig(
    vocab_size=64, num_layers=8, embed_dim=32, num_heads=4, mlp_dim=64, max_length=64
  )
  exits = (ExitConfig(layer=2), ExitConfig(layer=4))
  costs = estimate_costs(config, exits, max_drafts=7, lane_slope=0.1)
  head = 64 * 32 / (4 * 32 * 32 + 3 * 32 * 64)
  np.testing.assert_allclose(costs.plain, 8 + head)
  # Two drafts after layer 2: three passes, two heads, three lanes padded to four behind it.
  np.testing.assert_allclose(costs.rounds[0][1], 3 * 2 + 2 * head + 1.3 * (6 + head))
  # Four after layer 4: five lanes are padded to eight.
  np.testing.assert_allclose(costs.rounds[1][3], 5 * 4 + 4 * head + 1.7 * (4 + head))
  assert costs.speedup(0, 2, 3.0) == 3 * costs.plain / costs.rounds[0][1]
