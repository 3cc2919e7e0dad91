import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import decode
from exitax.errors import UserError

VOCAB = 11


def _requests(samplers, seeds=None):
  rows = len(samplers)
  column = lambda name: jnp.asarray([getattr(item, name) for item in samplers])  # noqa: E731
  return decode.Requests(
    seed=jnp.asarray(range(rows) if seeds is None else seeds, jnp.uint32),
    temperature=column('temperature').astype(jnp.float32),
    top_k=column('top_k'),
    top_p=column('top_p').astype(jnp.float32),
    min_p=column('min_p').astype(jnp.float32),
    stop_tokens=jnp.full((rows, 1), -1),
    budget=jnp.full((rows,), 8),
    thresholds=jnp.zeros((rows, 0)),
  )


def _reference(logits, sampler):
  """Filters one after the other, as Hugging Face's processors do, in float64."""
  scores = logits.astype(np.float64) / sampler.temperature

  def probs():
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()

  if sampler.top_k:
    scores = np.where(scores < np.sort(scores)[-min(sampler.top_k, VOCAB)], -np.inf, scores)
  if sampler.top_p < 1.0:
    order = np.argsort(scores)
    gone = np.cumsum(probs()[order]) <= 1 - sampler.top_p
    gone[-1] = False
    scores[order[gone]] = -np.inf
  if sampler.min_p:
    p = probs()
    scores = np.where(p < sampler.min_p * p.max(), -np.inf, scores)
  return probs()


SAMPLERS = [
  decode.Sampler(temperature=1.0),
  decode.Sampler(temperature=0.5),
  decode.Sampler(temperature=2.0, top_k=4),
  decode.Sampler(temperature=1.0, top_k=VOCAB + 5),
  decode.Sampler(temperature=1.3, top_p=0.6),
  decode.Sampler(temperature=1.0, top_p=0.01),
  decode.Sampler(temperature=0.8, min_p=0.3),
  decode.Sampler(temperature=1.5, top_k=6, top_p=0.8, min_p=0.2),
]


def test_filters_equal_the_reference_row_by_row():
  rng = np.random.default_rng(0)
  filter_rows = jax.jit(decode.filter_logits)
  for _ in range(20):
    logits = rng.normal(size=(len(SAMPLERS), VOCAB)).astype(np.float32) * 2
    ours = np.asarray(jax.nn.softmax(filter_rows(logits, _requests(SAMPLERS)), axis=-1))
    for row, sampler in enumerate(SAMPLERS):
      expected = _reference(logits[row], sampler)
      np.testing.assert_allclose(ours[row], expected, atol=1e-5, err_msg=str(sampler))


def test_a_filter_sees_what_the_one_before_has_left():
  """top-p after top-k: 0.4 of the renormalised pair is reached by the first token alone."""
  logits = np.log(np.array([[0.3, 0.28, 0.22, 0.2]], np.float32))
  sampler = decode.Sampler(temperature=1.0, top_k=2, top_p=0.4)
  kept = np.isfinite(decode.filter_logits(logits, _requests([sampler])))
  np.testing.assert_array_equal(kept, [[True, False, False, False]])


def test_frequencies_follow_the_filtered_distribution():
  """Chi-square over 20,000 draws; 10 degrees of freedom, p = 0.001 at 29.6."""
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(VOCAB,)).astype(np.float32)
  draws = 20_000
  for sampler in (decode.Sampler(temperature=1.0), SAMPLERS[-1]):
    one = jax.vmap(
      lambda step, sampler=sampler: decode.choose_tokens(
        logits[None], _requests([sampler], [3]), step[None]
      )[0]
    )
    counts = np.bincount(np.asarray(jax.jit(one)(jnp.arange(draws))), minlength=VOCAB)
    expected = _reference(logits, sampler) * draws
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert statistic < 29.6


def test_greedy_and_sampling_rows_share_a_batch():
  logits = np.tile(np.random.default_rng(2).normal(size=(1, VOCAB)).astype(np.float32), (3, 1))
  samplers = [decode.Sampler(), decode.Sampler(temperature=5.0), decode.Sampler()]
  choose = jax.jit(decode.choose_tokens)
  seen = set()
  for step in range(20):
    tokens = np.asarray(choose(logits, _requests(samplers), jnp.full((3,), step)))
    assert tokens[0] == tokens[2] == logits[0].argmax()
    seen.add(int(tokens[1]))
  assert len(seen) > 3


def test_the_draw_depends_on_seed_and_step_alone():
  logits = np.zeros((3, VOCAB), np.float32)
  samplers = [decode.Sampler(temperature=1.0)] * 3
  choose = jax.jit(decode.choose_tokens)

  def draws(seeds, steps):
    return np.stack(
      [choose(logits, _requests(samplers, seeds), jnp.asarray(steps) + i) for i in range(16)]
    )

  first = draws([7, 8, 9], [0, 4, 2])
  moved = draws([9, 7, 8], [2, 0, 4])
  np.testing.assert_array_equal(first, moved[:, [1, 2, 0]])
  assert (first[:, 0] != first[:, 1]).any()
  assert (first[:, 0] != draws([7, 8, 9], [1, 4, 2])[:, 0]).any()


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'temperature': -0.1}, 'temperature=-0.1'),
    ({'temperature': float('nan')}, 'temperature=nan'),
    ({'temperature': 1e39}, r'temperature=1e\+39 is outside'),
    ({'top_k': -1}, 'top_k=-1'),
    ({'top_k': 99999999999}, 'top_k=99999999999 is outside 0 .* to 2147483647'),
    ({'top_p': 0.0}, 'top_p=0.0'),
    ({'min_p': 1.5}, 'min_p=1.5'),
  ],
)
def test_settings_out_of_range_are_named(settings, message):
  with pytest.raises(UserError, match=message):
    decode.Sampler(**settings)
