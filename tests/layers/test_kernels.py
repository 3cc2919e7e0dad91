"""Attention over caches, in every form that it takes on the CPU, against the plain kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax.layers import cached_attention, dot_product_attention, quantise, ragged_attention
from exitax.layers.kernels import MAX_VECTOR_PRODUCTS

LANES = 3


def _cached(rows: int, lanes: int, *, num_heads: int = 4, num_kv_heads: int = 2):
  """Queries, head-major keys and values, and a mask under which every query sees something."""
  rng = np.random.default_rng(0)
  query = rng.normal(size=(rows, lanes, num_heads, 6))
  key, value = rng.normal(size=(2, rows, num_kv_heads, 11, 6))
  mask = rng.random((rows, lanes, 11)) < 0.5
  mask[..., 0] = True
  return jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), jnp.asarray(mask)


def _plain(query, key, value, mask):
  return dot_product_attention(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask)


@pytest.mark.parametrize('num_kv_heads', [1, 2, 4])
@pytest.mark.parametrize('lanes', [1, 2, MAX_VECTOR_PRODUCTS, MAX_VECTOR_PRODUCTS + 1])
def test_cached_attention_is_attention(x64, lanes, num_kv_heads):
  """Vector products for a few queries of a key head, matrix products for more."""
  arrays = _cached(2, lanes, num_kv_heads=num_kv_heads)
  np.testing.assert_allclose(cached_attention(*arrays), _plain(*arrays), atol=1e-12)


@pytest.mark.parametrize(
  'used', [(1, 1, 1, 1), (0, 3, 1, 1), (1, 2, 0, 3), (3, 2, 3, 1), (0, 0, 0, 0)]
)
def test_rows_use_as_many_lanes_as_they_say(x64, used):
  """Few rows with several lanes, as many as half of them, and more."""
  arrays = _cached(4, LANES)
  found = jax.jit(ragged_attention)(*arrays, jnp.asarray(used))
  read = np.arange(LANES) < np.asarray(used)[:, None]
  np.testing.assert_allclose(found[read], _plain(*arrays)[read], atol=1e-12)


def test_ragged_rows_of_eight_bits_are_cut_with_their_scales(x64):
  query, key, value, mask = _cached(3, LANES)
  small = quantise(key, (-1,)), quantise(value, (-1,))
  used = jnp.asarray((1, 3, 1))
  read = np.arange(LANES) < np.asarray(used)[:, None]
  expected = cached_attention(query, *small, mask)
  np.testing.assert_allclose(
    ragged_attention(query, *small, mask, used)[read], expected[read], atol=1e-6
  )
