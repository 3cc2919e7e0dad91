"""The block, its gated layer, and the exit heads that are made of the same parts."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import layers
from exitax.layers import BlockConfig, DropSite, HeadKind, Precision, RopeConfig

WIDTHS = {'embed_dim': 12, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 6, 'mlp_dim': 10}
CONFIG = BlockConfig(**WIDTHS, rope=RopeConfig(theta=30.0), precision=Precision.FLOAT64)


def _attend(query, key, value):
  """Causal attention over `[batch, length]`, and a state that can be recognised."""
  length = query.shape[1]
  mask = jnp.broadcast_to(
    jnp.tril(jnp.ones((length, length), bool)), (query.shape[0], length, length)
  )
  return layers.dot_product_attention(query, key, value, mask), 'kept'


def _arguments(dtype=jnp.float64):
  hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 12)), dtype)
  rotary = layers.make_rotary(CONFIG.rope, CONFIG.head_dim, jnp.arange(5)[None])
  return hidden, rotary, _attend


def _random_params(module: nn.Module, *arguments):
  shapes = jax.eval_shape(lambda key: module.init(key, *arguments), jax.random.key(0))
  params = nn.meta.unbox(shapes).get('params', {})
  rng = np.random.default_rng(1)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype), params)


def _norm(x, params):
  return np.asarray(layers.rms_normalise(jnp.asarray(x), params['scale'], CONFIG.norm_epsilon))


def _swiglu(x, params):
  kernel = {name: np.asarray(params[name]['kernel']) for name in ('gate', 'up', 'down')}
  gate = x @ kernel['gate']
  return (gate / (1 + np.exp(-gate)) * (x @ kernel['up'])) @ kernel['down']


def test_swiglu_is_the_formula(x64):
  hidden = _arguments()[0]
  mlp = layers.SwiGLU(CONFIG)
  params = _random_params(mlp, hidden)
  got = mlp.apply({'params': params}, hidden)
  np.testing.assert_allclose(got, _swiglu(np.asarray(hidden), params), atol=1e-13)


def test_block_adds_attention_then_mlp_to_the_stream(x64):
  hidden, rotary, attend = _arguments()
  block = layers.Block(CONFIG)
  params = _random_params(block, hidden, rotary, attend)
  got, state = block.apply({'params': params}, hidden, rotary, attend)
  attention = layers.Attention(CONFIG)
  normed = jnp.asarray(_norm(hidden, params['attention_norm']))
  mixed, _ = attention.apply({'params': params['attention']}, normed, rotary, attend)
  middle = np.asarray(hidden + mixed)
  wanted = middle + _swiglu(_norm(middle, params['mlp_norm']), params['mlp'])
  np.testing.assert_allclose(got, wanted, atol=1e-12)
  assert state == 'kept'


def test_block_drops_what_its_branches_add(x64):
  """Against NumPy with masks that are given: the stream itself is never dropped."""
  hidden, rotary, attend = _arguments()
  block = layers.Block(CONFIG)
  params = _random_params(block, hidden, rotary, attend)
  rng, rate = np.random.default_rng(2), 0.4
  scales = {
    site: (rng.random(hidden.shape) >= rate) / (1 - rate)
    for site in (DropSite.ATTENTION, DropSite.MLP)
  }
  got, _ = block.apply(
    {'params': params}, hidden, rotary, attend, lambda output, site: output * scales[site]
  )
  attention = layers.Attention(CONFIG)
  normed = jnp.asarray(_norm(hidden, params['attention_norm']))
  mixed, _ = attention.apply({'params': params['attention']}, normed, rotary, attend)
  middle = np.asarray(hidden) + np.asarray(mixed) * scales[DropSite.ATTENTION]
  output = _swiglu(_norm(middle, params['mlp_norm']), params['mlp'])
  np.testing.assert_allclose(got, middle + output * scales[DropSite.MLP], atol=1e-12)


def test_bfloat16_block_follows_float32():
  narrow = BlockConfig(**WIDTHS, precision=Precision.BFLOAT16)
  wide = BlockConfig(**WIDTHS)
  arguments = _arguments(jnp.float32)
  params = _random_params(layers.Block(wide), *arguments)
  wanted, _ = layers.Block(wide).apply({'params': params}, *arguments)
  hidden, rotary, attend = arguments
  got, _ = layers.Block(narrow).apply(
    {'params': params}, hidden.astype(jnp.bfloat16), rotary, attend
  )
  assert got.dtype == jnp.bfloat16
  error = jnp.abs(got.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max()
  assert 0 < error < 0.03


@pytest.mark.parametrize('kind', list(HeadKind))
def test_exit_heads_are_what_they_are_called(x64, kind):
  hidden, rotary, attend = _arguments()
  head = layers.ExitHead(CONFIG, kind)
  params = _random_params(head, hidden, rotary, attend)
  got, state = head.apply({'params': params}, hidden, rotary, attend)
  x = np.asarray(hidden)
  match kind:
    case HeadKind.EMBEDDING:
      wanted, parts = x, set()
    case HeadKind.NORM:
      wanted, parts = _norm(x, params['norm']), {'norm'}
    case HeadKind.MLP:
      x = x + _swiglu(_norm(x, params['mlp_norm']), params['mlp'])
      wanted, parts = _norm(x, params['norm']), {'mlp_norm', 'mlp', 'norm'}
    case HeadKind.LAYER:
      block = layers.Block(CONFIG)
      x, _ = block.apply({'params': params['block']}, hidden, rotary, attend)
      wanted, parts = _norm(x, params['norm']), {'block', 'norm'}
  np.testing.assert_allclose(got, wanted, atol=1e-12)
  assert set(params) == parts
  assert state == ('kept' if kind is HeadKind.LAYER else None)
