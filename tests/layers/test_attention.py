from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import layers
from exitax.layers import BlockConfig, Precision, RopeConfig

CONFIG = BlockConfig(
  embed_dim=12,
  num_heads=4,
  num_kv_heads=2,
  head_dim=6,
  mlp_dim=10,
  rope=RopeConfig(theta=30.0),
  qk_norm=True,
  qkv_bias=True,
  output_bias=True,
  precision=Precision.FLOAT64,
)


def _boxed_shapes(module: nn.Module, *arguments) -> Any:
  """The module's parameters as shapes, still boxed with their logical names."""
  return jax.eval_shape(lambda key: module.init(key, *arguments)['params'], jax.random.key(0))


def _random_params(module: nn.Module, *arguments) -> Any:
  """Every leaf drawn at random, biases and scales too, so that none can be left out unseen."""
  rng = np.random.default_rng(0)
  shapes = nn.meta.unbox(_boxed_shapes(module, *arguments))
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype), shapes)


def naive_attention(query, key, value, mask):
  """One query, one head at a time; `[batch, length, heads, head_dim]`."""
  batch, num_queries, num_heads, head_dim = query.shape
  group = num_heads // key.shape[2]
  mixed = np.zeros_like(query)
  for b in range(batch):
    for q in range(num_queries):
      for h in range(num_heads):
        seen = np.flatnonzero(mask[b, q])
        scores = key[b, seen, h // group] @ query[b, q, h] / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        mixed[b, q, h] = weights @ value[b, seen, h // group] / weights.sum()
  return mixed


def _arrays(rng, num_queries=5, num_keys=7, num_heads=4, num_kv_heads=2, head_dim=6):
  query = rng.normal(size=(2, num_queries, num_heads, head_dim))
  key, value = rng.normal(size=(2, 2, num_keys, num_kv_heads, head_dim))
  mask = rng.random((2, num_queries, num_keys)) < 0.5
  mask[..., 0] = True
  return query, key, value, mask


@pytest.mark.parametrize('num_kv_heads', [1, 2, 4])
def test_kernel_is_softmax_attention(x64, num_kv_heads):
  arrays = _arrays(np.random.default_rng(0), num_kv_heads=num_kv_heads)
  got = layers.dot_product_attention(*map(jnp.asarray, arrays))
  np.testing.assert_allclose(got, naive_attention(*arrays), atol=1e-13)


def test_masked_keys_have_no_weight_at_all(x64):
  query, key, value, mask = _arrays(np.random.default_rng(1))
  mask[:, :, 3] = False
  hidden = ~mask.any(axis=1)
  assert hidden.any()
  changed = layers.dot_product_attention(
    jnp.asarray(query),
    jnp.asarray(np.where(hidden[..., None, None], 1e6, key)),
    jnp.asarray(np.where(hidden[..., None, None], -1e6, value)),
    jnp.asarray(mask),
  )
  kept = layers.dot_product_attention(*map(jnp.asarray, (query, key, value, mask)))
  np.testing.assert_array_equal(changed, kept)


def test_a_query_that_sees_nothing_stays_finite():
  query, key, value, mask = _arrays(np.random.default_rng(2))
  mask[0, 1] = False

  def total(query: jax.Array) -> jax.Array:
    return jnp.sum(layers.dot_product_attention(query, *map(jnp.float32, (key, value)), mask))

  result, gradient = jax.value_and_grad(total)(jnp.float32(query))
  assert np.isfinite(result)
  assert np.isfinite(gradient).all()


def test_bfloat16_kernel_follows_float32():
  """Including the scale: with head_dim 6 its factor is no bfloat16 number."""
  rng = np.random.default_rng(3)
  query, key, value, mask = _arrays(rng, num_keys=32)
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in (4 * query, 4 * key, value)]
  got = layers.dot_product_attention(*narrow, jnp.asarray(mask[..., :32]))
  assert got.dtype == jnp.bfloat16
  wanted = naive_attention(*(np.asarray(x, np.float64) for x in narrow), mask)
  np.testing.assert_allclose(np.asarray(got, np.float64), wanted, atol=2e-2)


def _attend(mask):
  return lambda q, k, v: (layers.dot_product_attention(q, k, v, mask), 'state')


def _naive_layer(params, hidden, mask, config):
  """The whole attention layer in NumPy, with rotation by complex numbers."""
  length = hidden.shape[1]

  def rotated(x):
    half = config.head_dim // 2
    angle = np.arange(length)[:, None] * layers.inverse_frequencies(config.rope, config.head_dim)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)

  def normed(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale

  def projected(name):
    y = np.einsum('ble,ehd->blhd', hidden, params[name]['kernel'])
    return y + params[name]['bias'] if config.qkv_bias else y

  query, key, value = (projected(name) for name in ('query', 'key', 'value'))
  if config.qk_norm:
    query = normed(query, params['query_norm']['scale'])
    key = normed(key, params['key_norm']['scale'])
  mixed = naive_attention(rotated(query), rotated(key), value, mask)
  output = np.einsum('blhd,hde->ble', mixed, params['output']['kernel'])
  return output + params['output']['bias'] if config.output_bias else output


@pytest.mark.parametrize(
  'changes',
  [{}, {'qk_norm': False}, {'qkv_bias': False, 'output_bias': False}],
  ids=['all', 'no qk norm', 'no biases'],
)
def test_layer_is_the_formula(x64, changes):
  config = dataclasses.replace(CONFIG, **changes)
  hidden = np.random.default_rng(4).normal(size=(2, 5, 12))
  mask = np.broadcast_to(np.tril(np.ones((5, 5), bool)), (2, 5, 5))
  rotary = layers.make_rotary(config.rope, config.head_dim, jnp.arange(5)[None])
  layer = layers.Attention(config)
  arguments = (jnp.asarray(hidden), rotary, _attend(jnp.asarray(mask)))
  params = _random_params(layer, *arguments)
  got, state = layer.apply({'params': params}, *arguments)
  wanted = _naive_layer(jax.tree.map(np.asarray, params), hidden, mask, config)
  np.testing.assert_allclose(got, wanted, atol=1e-12)
  assert state == 'state'
  assert ('query_norm' in params, 'bias' in params['key']) == (config.qk_norm, config.qkv_bias)


def test_parameters_name_their_axes():
  hidden = jnp.zeros((1, 1, 12))
  rotary = layers.make_rotary(CONFIG.rope, 6, jnp.zeros((1, 1), jnp.int32))
  config = dataclasses.replace(CONFIG, precision=Precision.FLOAT32)
  names = jax.tree.map(
    lambda box: (box.names, box.value.shape),
    _boxed_shapes(layers.Attention(config), hidden, rotary, lambda q, k, v: (q, None)),
    is_leaf=lambda x: isinstance(x, nn.Partitioned),
  )
  assert names['query']['kernel'] == (('embed', 'heads', 'kv'), (12, 4, 6))
  assert names['key'] == {
    'kernel': (('embed', 'kv_heads', 'kv'), (12, 2, 6)),
    'bias': (('kv_heads', 'kv'), (2, 6)),
  }
  assert names['output']['kernel'] == (('heads', 'kv', 'embed'), (4, 6, 12))
  assert names['query_norm']['scale'] == (('kv',), (6,))


def test_leading_shape_is_free():
  """Flat tokens, as decoding passes them, get what the same tokens get in a batch."""
  config = dataclasses.replace(CONFIG, precision=Precision.FLOAT32)
  hidden = jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, 12)), jnp.float32)
  positions = jnp.asarray([[0, 1, 2], [5, 6, 7]])
  layer = layers.Attention(config)

  def attend(query, key, value):
    return query + jnp.repeat(key * value, 2, axis=-2), None

  def arguments(shape):
    rotary = layers.make_rotary(config.rope, 6, positions.reshape(shape))
    return hidden.reshape(*shape, 12), rotary, attend

  params = {'params': _random_params(layer, *arguments((2, 3)))}
  batched, _ = layer.apply(params, *arguments((2, 3)))
  flat, _ = layer.apply(params, *arguments((6,)))
  np.testing.assert_allclose(flat.reshape(2, 3, 12), batched, atol=1e-6)
