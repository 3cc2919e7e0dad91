from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import layers
from exitax.layers import causal


def _inputs(length, *, dtype, num_heads=4, num_kv_heads=2, head_dim=6, seed=0):
  """Query, key, value, a cotangent, and the mask of two documents per row."""
  rng = np.random.default_rng(seed)

  def draw(heads):
    return jnp.asarray(rng.normal(size=(2, length, heads, head_dim)), dtype)

  document = np.arange(length)[None] >= np.asarray([[length // 3], [length // 2]])
  mask = (document[:, :, None] == document[:, None, :]) & np.tri(length, dtype=bool)
  arrays = draw(num_heads), draw(num_kv_heads), draw(num_kv_heads)
  return arrays, draw(num_heads), jnp.asarray(mask)


def _results(attention, arrays, up, mask):
  output, vjp = jax.vjp(lambda *arrays: attention(*arrays, mask), *arrays)
  return output, *vjp(up)


@pytest.mark.parametrize('weights', causal.Weights)
@pytest.mark.parametrize('length', [1, 4, 10, 23])
def test_blocks_equal_the_whole_square_and_its_autodiff(x64, monkeypatch, length, weights):
  """One block, whole blocks, a ragged last one, more tokens than MAX_BLOCKS small blocks hold."""
  monkeypatch.setattr(causal, 'MIN_BLOCK', 2)
  monkeypatch.setattr(causal, 'MAX_BLOCKS', 5)
  arrays, up, mask = _inputs(length, dtype=jnp.float64)
  blocked = _results(lambda *args: causal.blocked_attention(*args, weights), arrays, up, mask)
  plain = _results(layers.dot_product_attention, arrays, up, mask)
  for got, wanted in zip(blocked, plain, strict=True):
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_blocks_do_just_over_half_of_the_square():
  assert causal.attention_blocks(10) == [(0, 10)]
  for length in (256, 2048, 3000):
    blocks = causal.attention_blocks(length)
    assert [start for start, _ in blocks[1:]] == [stop for _, stop in blocks[:-1]]
    assert (blocks[0][0], blocks[-1][1]) == (0, length)
    assert len(blocks) <= causal.MAX_BLOCKS
    work = sum((stop - start) * stop for start, stop in blocks) / length**2
    assert work < 0.63


def test_nothing_of_the_size_of_the_square_is_kept_off_the_cpu(monkeypatch):
  arrays, _, mask = _inputs(512, dtype=jnp.float32)

  def largest_kept():
    def pullback(*arrays):
      return jax.vjp(lambda *arrays: layers.causal_attention(*arrays, mask), *arrays)[1]

    leaves = jax.tree.leaves(jax.eval_shape(pullback, *arrays))
    return max(leaf.size for leaf in leaves if leaf.dtype != bool)

  square = 512 * 512 // causal.MAX_BLOCKS
  assert largest_kept() > square
  monkeypatch.setattr(layers.platform, 'on_cpu', lambda: False)
  assert largest_kept() < square


def test_mask_is_narrowed_to_earlier_tokens_on_every_platform(monkeypatch):
  arrays, up, mask = _inputs(9, dtype=jnp.float32)
  everything = jnp.ones_like(mask)
  on_cpu = _results(layers.causal_attention, arrays, up, everything)
  monkeypatch.setattr(layers.platform, 'on_cpu', lambda: False)
  elsewhere = _results(layers.causal_attention, arrays, up, everything)
  oracle = _results(layers.dot_product_attention, arrays, up, jnp.tri(9, dtype=bool) & everything)
  for got, other, wanted in zip(on_cpu, elsewhere, oracle, strict=True):
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(other, wanted, atol=1e-5)
  assert not np.allclose(on_cpu[0], layers.dot_product_attention(*arrays, everything), atol=1e-3)


def test_bfloat16_follows_float32():
  narrow, up, mask = _inputs(70, dtype=jnp.bfloat16, head_dim=16)
  wide = tuple(x.astype(jnp.float32) for x in narrow)
  got = _results(layers.causal_attention, narrow, up, mask)
  wanted = _results(layers.causal_attention, wide, up.astype(jnp.float32), mask)
  for x, y in zip(got, wanted, strict=True):
    assert x.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(x, np.float32), y, atol=0.02 * float(jnp.abs(y).max()))
