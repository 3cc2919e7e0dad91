"""Joined maps of one input give what the separate ones give."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import layers
from exitax.layers import BlockConfig, Precision

CONFIG = BlockConfig(
  embed_dim=12, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=10, precision=Precision.FLOAT64
)


def _attend(query, key, value):
  mask = jnp.ones((query.shape[0], query.shape[1], key.shape[1]), bool)
  return layers.dot_product_attention(query, key, value, mask), None


@pytest.mark.parametrize('bias', [False, True], ids=['plain', 'biases'])
def test_a_joined_block_is_the_block(x64, bias):
  block = layers.Block(dataclasses.replace(CONFIG, qkv_bias=bias, qk_norm=bias))
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(2, 5, 12)))
  rotary = layers.make_rotary(CONFIG.rope, CONFIG.head_dim, jnp.arange(5)[None])
  shapes = nn.meta.unbox(
    jax.eval_shape(lambda key: block.init(key, hidden, rotary, _attend), jax.random.key(0))
  )['params']
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), shapes)
  joined = layers.join_linears(params)
  assert set(joined['mlp']) == {'gate_up', 'down'}
  assert joined['attention']['query_key_value']['kernel'].shape == (12, (4 + 2 + 2) * 6)
  sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, joined)]
  assert sizes[0] == sizes[1]
  wanted, _ = block.apply({'params': params}, hidden, rotary, _attend)
  got, _ = block.apply({'params': joined}, hidden, rotary, _attend)
  np.testing.assert_allclose(got, wanted, rtol=1e-12)
  again = layers.join_linears(joined)
  assert all(a is b for a, b in zip(*map(jax.tree.leaves, (joined, again)), strict=True))
