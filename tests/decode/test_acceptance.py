import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from exitax.decode import Requests, choose_tokens, filter_logits
from exitax.decode.acceptance import choose_lanes, judge

VOCAB, SEEDS, DRAFTS = 7, 20_000, 2


def _requests(rows, **changes):
  settings = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, **changes}
  types = {'top_k': np.int32}
  return Requests(
    seed=np.arange(rows, dtype=np.uint32),
    **{name: np.full(rows, x, types.get(name, np.float32)) for name, x in settings.items()},
    stop_tokens=np.full((rows, 1), -1, np.int32),
    budget=np.full(rows, 99, np.int32),
    thresholds=np.zeros((rows, 0), np.float32),
  )


def _judged(requests, *, rejection, rows=SEEDS, closeness=1.0):
  """The verdict over many seeds, where scores depend on the lane alone, not on what was drafted."""
  rng = np.random.default_rng(0)
  final = rng.normal(size=(DRAFTS + 1, VOCAB)).astype(np.float32)
  early = final[:-1] + closeness * rng.normal(size=(DRAFTS, VOCAB)).astype(np.float32)
  step = jnp.zeros(rows, jnp.int32)
  scores = jnp.broadcast_to(final, (rows, DRAFTS + 1, VOCAB))
  draft_scores = jnp.broadcast_to(early, (rows, DRAFTS, VOCAB))
  drafts = choose_lanes(draft_scores, requests, step)
  kept = draft_scores if rejection else None
  verdict = jax.jit(judge)(drafts, DRAFTS, scores, kept, requests, step)
  return final, early, jax.device_get(verdict), np.asarray(drafts)


def _distribution(scores, requests):
  rows = scores.shape[0]
  few = jax.tree.map(lambda x: x[:rows], requests)
  exponents = np.exp(np.asarray(filter_logits(jnp.asarray(scores), few), np.float64))
  return exponents / exponents.sum(axis=-1, keepdims=True)


SETTINGS = [{}, {'temperature': 0.6}, {'top_k': 4}, {'top_p': 0.8, 'temperature': 1.4}]


@pytest.mark.parametrize('rejection', [True, False], ids=['rejection', 'coupled'])
@pytest.mark.parametrize('settings', SETTINGS, ids=str)
def test_every_token_that_stands_has_the_final_layers_distribution(settings, rejection):
  """Chi-square against exact probabilities, for each lane given that the row got so far."""
  requests = _requests(SEEDS, **settings)
  final, _, verdict, _ = _judged(requests, rejection=rejection)
  exact = _distribution(final, requests)
  for lane in range(DRAFTS + 1):
    tokens = verdict.tokens[verdict.accepted >= lane, lane]
    counts = np.bincount(tokens, minlength=VOCAB)
    possible = exact[lane] > 0
    assert counts[~possible].sum() == 0
    _, p_value = scipy.stats.chisquare(counts[possible], exact[lane, possible] * len(tokens))
    assert p_value > 1e-3, (lane, counts)
  assert (verdict.accepted == DRAFTS).any()
  assert (verdict.accepted == 0).any()


def test_drafts_handed_on_unjudged_would_fail_the_same_check():
  requests = _requests(SEEDS)
  final, _, _, drafts = _judged(requests, rejection=True)
  counts = np.bincount(drafts[:, 0], minlength=VOCAB)
  _, p_value = scipy.stats.chisquare(counts, _distribution(final, requests)[0] * SEEDS)
  assert p_value < 1e-9


def test_rejection_accepts_as_often_as_the_distributions_overlap():
  """The chance is the sum of min(p, q): the most that any exact rule can reach (arXiv 2211.17192)."""
  requests = _requests(SEEDS)
  final, early, verdict, _ = _judged(requests, rejection=True)
  p, q = _distribution(final[:-1], requests), _distribution(early, requests)
  overlap = np.minimum(p, q).sum(axis=1)
  first = (verdict.accepted >= 1).mean()
  assert abs(first - overlap[0]) < 4 * np.sqrt(0.25 / SEEDS)
  _, _, coupled, _ = _judged(requests, rejection=False)
  assert (coupled.accepted >= 1).mean() < first


def test_tokens_per_round_follow_the_formula():
  """Where every lane agrees equally often, a round gains (1 - a^(d+1)) / (1 - a) tokens."""
  requests = _requests(SEEDS)
  final, early, verdict, _ = _judged(requests, rejection=True)
  p, q = _distribution(final[:-1], requests), _distribution(early, requests)
  a = np.minimum(p, q).sum(axis=1)
  expected = 1 + a[0] + a[0] * a[1]
  assert abs(verdict.accepted.mean() + 1 - expected) < 0.02


@pytest.mark.parametrize('rejection', [True, False], ids=['rejection', 'coupled'])
def test_greedy_rows_take_the_final_layers_best_token(rejection):
  requests = _requests(3, temperature=0.0)
  final, early, verdict, _ = _judged(requests, rejection=rejection, rows=3)
  best, drafted = final.argmax(-1), early.argmax(-1)
  run = int(np.cumprod(best[:-1] == drafted).sum())
  assert (verdict.accepted == run).all()
  assert (verdict.tokens[:, : run + 1] == best[: run + 1]).all()


def test_greedy_and_sampled_rows_share_a_batch():
  mixed = _requests(2, temperature=0.0)
  mixed = mixed.replace(temperature=np.array([0.0, 1.0], np.float32))
  final, _, verdict, _ = _judged(mixed, rejection=True, rows=2)
  run = verdict.accepted[0]
  assert (verdict.tokens[0, : run + 1] == final.argmax(-1)[: run + 1]).all()


def test_coupled_choices_are_those_of_single_steps():
  requests = _requests(50, temperature=0.8, top_p=0.9)
  final, _, verdict, _ = _judged(requests, rejection=False, rows=50)
  for lane in range(DRAFTS + 1):
    alone = choose_tokens(
      jnp.broadcast_to(final[lane], (50, VOCAB)), requests, jnp.full(50, lane, jnp.int32)
    )
    np.testing.assert_array_equal(verdict.tokens[:, lane], alone)


def test_lanes_beyond_the_drafts_are_not_judged():
  requests = _requests(40)
  scores = jnp.zeros((40, 4, VOCAB))
  drafts = choose_lanes(scores[:, :-1], requests, jnp.zeros(40, jnp.int32))
  verdict = judge(drafts, 1, scores, scores[:, :-1], requests, jnp.zeros(40, jnp.int32))
  assert (np.asarray(verdict.accepted) == 1).all()  # Equal distributions accept all that is meant.
