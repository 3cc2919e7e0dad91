"""Decoding with matrices, or keys and values, in 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import decode
from exitax.decode.cache import empty_in_format, write_layer
from exitax.layers import HeadKind, Int8, cached_attention, quantise
from exitax.models.forward import packed_attend

NEW = 16


def _dequantised(params):
  return jax.tree.map(
    lambda x: x.dequantise(jnp.float32) if isinstance(x, Int8) else x,
    params,
    is_leaf=lambda x: isinstance(x, Int8),
  )


def test_int8_weights_give_the_tokens_of_their_dequantised_copy(tiny, prompts):
  model, params = tiny(HeadKind.LAYER, qkv_bias=True)
  policy = decode.DeferredExit(threshold=0.55)
  small = decode.prepare_params(model, params, weights=decode.WeightFormat.INT8)
  found = decode.generate(model, small, prompts, max_new_tokens=NEW, policy=policy)
  exact = decode.generate(model, _dequantised(small), prompts, max_new_tokens=NEW, policy=policy)
  assert found.tokens == exact.tokens
  for a, b in zip(found.completions, exact.completions, strict=True):
    np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-3)


def test_int8_weights_take_a_quarter_of_the_memory(tiny):
  model, params = tiny()
  whole = decode.prepare_params(model, params)
  small = decode.prepare_params(model, params, weights=decode.WeightFormat.INT8)
  sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (whole, small)]
  assert sizes[1] < sizes[0] / 2.5  # Scales weigh something at a width of 32.
  assert decode.prepare_params(model, small) is small


# Keys and values.

SMALL = decode.CacheFormat.INT8


def test_attention_over_8_bits_is_that_over_the_dequantised_cache():
  rng = np.random.default_rng(0)
  rows, lanes, kv_heads, capacity, width = 2, 3, 2, 10, 8
  key, value = rng.normal(size=(2, rows, lanes, kv_heads, width)).astype(np.float32)
  query = rng.normal(size=(rows, lanes, 2 * kv_heads, width)).astype(np.float32)
  empty = jnp.zeros((rows, kv_heads, capacity, width))
  cache = decode.KVCache(
    layers=(decode.LayerCache(key=empty, value=empty),), heads={}, columns=None
  )
  (entry,) = empty_in_format(cache, SMALL).layers
  places = decode.consecutive_lanes(np.array([0, 4]), np.array([3, 2]), num_lanes=lanes)
  entry = write_layer(entry, key, value, places)
  wide = decode.LayerCache(
    key=entry.key.dequantise(jnp.float32), value=entry.value.dequantise(jnp.float32)
  )
  # Each written entry is within half a step of what was written, and nothing else was touched.
  step = np.abs(key[1]).max(-1) / 127
  error = np.abs(np.asarray(wide.key)[1, :, 4:7].swapaxes(0, 1) - key[1]).max(-1)
  assert (error <= 0.51 * step).all()
  assert (np.asarray(wide.key)[1, :, :4] == 0).all()
  mask = np.zeros((rows, lanes, capacity), bool)
  mask[0, :, :3], mask[1, :, 4:6] = True, True
  np.testing.assert_allclose(
    cached_attention(query, entry.key, entry.value, mask),
    cached_attention(query, wide.key, wide.value, mask),
    atol=1e-5,
  )


def test_full_depth_over_an_int8_cache_is_a_pass_over_rounded_keys_and_values(tiny, prompts):
  """The cache-free oracle rounds what attention sees of every token, its own included."""
  model, params = tiny(HeadKind.NORM)
  result = decode.generate(model, params, prompts, max_new_tokens=NEW, cache_format=SMALL)
  positions = jnp.arange(64)[None]
  attend = packed_attend(jnp.ones((1, 64), jnp.int32), positions, None)

  def rounded(query, key, value):
    key, value = (quantise(x, (-1,)).dequantise(x.dtype) for x in (key, value))
    return attend(query, key, value)

  for prompt, completion in zip(prompts, result.completions, strict=True):
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt) + NEW] = [*prompt, *completion.tokens]
    hidden = model.embed(params, tokens)
    rotary = model.rotary(positions)
    (*_, last) = model.hidden_at_exits(params, hidden, rotary=rotary, attend=rounded)
    features, _ = model.exit_features(params, None, last, rotary=None, attend=None)
    scores = jax.nn.log_softmax(model.logits(params, None, features))[0]
    at = len(prompt) - 1 + np.arange(NEW)
    np.testing.assert_allclose(completion.log_probs, scores[at, completion.tokens], atol=2e-3)
    np.testing.assert_allclose(scores[at].max(-1), completion.log_probs, atol=2e-3)


@pytest.mark.parametrize(
  'policy',
  [decode.DeferredExit(threshold=0.55), decode.CopyStateExit(threshold=0.55)],
  ids=lambda policy: type(policy).__name__,
)
def test_rows_over_an_int8_cache_do_not_depend_on_their_neighbours(tiny, prompts, policy):
  model, params = tiny(HeadKind.LAYER)
  settings = {'max_new_tokens': NEW, 'policy': policy, 'cache_format': SMALL}
  small = decode.generate(model, params, prompts, **settings)
  assert decode.generate(model, params, prompts[:1], **settings).tokens[0] == small.tokens[0]
  assert 1 < small.effective_layers < 4


def test_speculation_over_an_int8_cache_is_full_depth_over_it(tiny, prompts):
  model, params = tiny(HeadKind.LAYER)
  settings = {'max_new_tokens': NEW, 'cache_format': SMALL}
  policy = decode.Speculative(exit_layer=1, num_drafts=3)
  quick = decode.generate(model, params, prompts, policy=policy, **settings)
  assert quick.tokens == decode.generate(model, params, prompts, **settings).tokens


def test_an_int8_cache_takes_three_eighths_of_the_memory_of_narrow_heads(tiny):
  model, _ = tiny()
  plan = decode.FullDepth().plan(model.config)
  sizes = []
  for cache_format in decode.CacheFormat:
    state = decode.init_state(
      model.config,
      plan,
      tokens=np.zeros((2, 64), np.int32),
      prompt_length=np.ones(2, np.int32),
      requests=decode.make_requests(
        model.config,
        policy=decode.FullDepth(),
        samplers=[decode.Sampler()] * 2,
        stop_tokens=(),
        seeds=range(2),
        budgets=[4] * 2,
      ),
      cache_format=cache_format,
    )
    sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache.layers)))
  # Heads of 8 numbers: 8 bytes and a scale of 4 for 32 bytes.
  assert sizes[1] == sizes[0] * 12 / 32
