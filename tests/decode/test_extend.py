import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import decode
from exitax.layers import HeadKind, Precision
from exitax.models import features_at_exits

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5]])
LENGTH = TOKENS.shape[1]


@functools.partial(jax.jit, static_argnames=('model', 'layers'))
def _extend(model, params, cache, hidden, lanes, layers):
  visibility = decode.Causal(model.config.sliding_window)
  return decode.extend(model, params, cache, hidden, lanes, layers=layers, visibility=visibility)


def _run(model, params, cuts, *, spans=((0, 4),), head_layers=(), cache=None, valid=None):
  """Hidden states of all tokens when they come in pieces between `cuts`, span after span."""
  params = model.unstack(params)
  rows = TOKENS.shape[0]
  if cache is None:
    cache = decode.init_cache(model.config, rows=rows, capacity=20, head_layers=head_layers)
  count = np.full((rows,), LENGTH) if valid is None else valid
  outputs, features = [], []
  for a, b in itertools.pairwise(cuts):
    first = jnp.full((rows,), a, jnp.int32)
    lanes = decode.consecutive_lanes(first, jnp.clip(count - a, 0, b - a), num_lanes=b - a)
    hidden = model.embed(params, TOKENS[:, a:b])
    heads = {}
    for start, stop in spans:
      after = _extend(model, params, cache, hidden, lanes, range(start, stop))
      hidden, cache = after.hidden, after.cache
      heads |= after.head_features
    outputs.append(hidden)
    features.append(heads)
  joined = {k: jnp.concatenate([item[k] for item in features], axis=1) for k in features[0]}
  return jnp.concatenate(outputs, axis=1), joined, cache


ARCHITECTURES = {
  'gqa': {},
  'multi_head': {'num_kv_heads': 4},
  'multi_query': {'num_kv_heads': 1},
  'qk_norm': {'qk_norm': True, 'qkv_bias': True, 'head_dim': 12},
  'sliding_window': {'sliding_window': 4},
}


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_pieces_of_any_size_equal_the_cache_free_forward(x64, tiny, name):
  # In float64: sharpened random layers make of float32's rounding what would hide a mistake.
  model, params = tiny(HeadKind.LAYER, precision=Precision.FLOAT64, **ARCHITECTURES[name])
  positions = np.broadcast_to(np.arange(LENGTH), TOKENS.shape)
  oracle = features_at_exits(model, params, TOKENS, np.ones_like(TOKENS), positions)
  for cuts in ([0, LENGTH], [0, 5, 8, LENGTH], list(range(LENGTH + 1))):
    hidden, heads, _ = _run(model, params, cuts, head_layers=(1, 2))
    final, _ = model.exit_features(params, None, hidden, rotary=None, attend=None)
    for ours, theirs in zip((heads[1], heads[2], final), oracle, strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-11, rtol=1e-11)


def test_any_split_of_layers_equals_the_whole(tiny):
  model, params = tiny(HeadKind.LAYER)
  whole, heads, cache = _run(model, params, [0, 5, LENGTH], head_layers=(1, 2))
  for spans in (((0, 1), (1, 4)), ((0, 2), (2, 3), (3, 4)), tuple((i, i + 1) for i in range(4))):
    split, split_heads, split_cache = _run(
      model, params, [0, 5, LENGTH], spans=spans, head_layers=(1, 2)
    )
    np.testing.assert_allclose(split, whole, atol=1e-4)
    np.testing.assert_allclose(split_heads[2], heads[2], atol=1e-4)
    for ours, theirs in zip(jax.tree.leaves(split_cache), jax.tree.leaves(cache), strict=True):
      np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_poisoned_unused_columns_change_nothing(tiny):
  model, params = tiny()
  empty = decode.init_cache(model.config, rows=2, capacity=20)
  poisoned = empty.replace(layers=jax.tree.map(lambda x: jnp.full_like(x, 1e4), empty.layers))
  clean, _, _ = _run(model, params, [0, 5, LENGTH], cache=empty)
  dirty, _, _ = _run(model, params, [0, 5, LENGTH], cache=poisoned)
  np.testing.assert_array_equal(clean, dirty)


def test_rows_of_different_lengths_do_not_disturb_each_other(tiny):
  model, params = tiny()
  full, _, _ = _run(model, params, [0, 5, LENGTH])
  ragged, _, cache = _run(model, params, [0, 5, LENGTH], valid=np.array([LENGTH, 3]))
  np.testing.assert_allclose(ragged[0], full[0], atol=1e-4)
  np.testing.assert_allclose(ragged[1, :3], full[1, :3], atol=1e-4)
  np.testing.assert_array_equal(cache.columns.valid.sum(1), [LENGTH, 3])


def test_the_oracle_can_tell_a_wrong_window(tiny):
  """The comparison above is not blind: another visibility gives other hidden states."""
  model, params = tiny()
  narrow, _ = tiny(sliding_window=4)
  wide_hidden, _, _ = _run(model, params, [0, LENGTH])
  narrow_hidden, _, _ = _run(narrow, params, [0, LENGTH])
  assert np.abs(wide_hidden - narrow_hidden)[:, :4].max() < 1e-4
  assert np.abs(wide_hidden - narrow_hidden)[:, 4:].max() > 1e-2
