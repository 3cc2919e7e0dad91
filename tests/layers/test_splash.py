"""The TPU's fused attention, interpreted on the CPU, against plain attention."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import layers, models, parallel
from exitax.parallel import MeshConfig, ShardingRules, make_mesh

LENGTH = 256


def _inputs(*, batch=1, num_heads=4, num_kv_heads=2, head_dim=16):
  rng = np.random.default_rng(0)

  def draw(heads):
    return jnp.asarray(rng.normal(size=(batch, LENGTH, heads, head_dim)), jnp.float32)

  segment_ids = np.where(np.arange(LENGTH) < 100, 1, 2)
  segment_ids[240:] = 0
  positions = np.concatenate([np.arange(100), np.arange(140), np.zeros(16, int)])
  ids, places = (jnp.asarray(np.tile(x, (batch, 1)), jnp.int32) for x in (segment_ids, positions))
  arrays = draw(num_heads), draw(num_kv_heads), draw(num_kv_heads)
  return arrays, draw(num_heads), ids, places


def _results(attention, arrays, up):
  output, vjp = jax.vjp(attention, *arrays)
  return output, *vjp(up)


def _oracle(ids, places, window):
  mask = models.packed_mask(ids, places, window) & np.tri(LENGTH, dtype=bool)
  return functools.partial(layers.dot_product_attention, mask=mask)


@pytest.mark.parametrize('window', [None, 37])
def test_splash_equals_plain_attention(window):
  arrays, up, ids, places = _inputs()
  # Padding sees padding, by the kernel's own rule: not compared.
  up = up * (ids > 0)[:, :, None, None]

  def splash(*arrays):
    mixed = layers.splash_attention(*arrays, ids, sliding_window=window, interpret=True)
    return jnp.where((ids > 0)[:, :, None, None], mixed, 0)

  def plain(*arrays):
    return jnp.where((ids > 0)[:, :, None, None], _oracle(ids, places, window)(*arrays), 0)

  for got, wanted in zip(_results(splash, arrays, up), _results(plain, arrays, up), strict=True):
    np.testing.assert_allclose(got, wanted, atol=2e-5)


@pytest.mark.parametrize('tensor', [2, 4])
def test_every_device_attends_for_its_own_heads_and_rows(tensor):
  """Two key heads over four devices: every query head gets a key head of its own."""
  arrays, up, ids, places = _inputs(batch=2)
  mesh = make_mesh(MeshConfig(data=2, tensor=tensor), jax.devices()[: 2 * tensor])

  def splash(*arrays):
    return layers.splash_attention(*arrays, ids, interpret=True)

  wanted = _results(_oracle(ids, places, None), arrays, up)
  with parallel.use(mesh, ShardingRules()):
    got = jax.jit(functools.partial(_results, splash))(arrays, up)
  inside = np.asarray(ids > 0)
  for x, y in zip(got[:1], wanted[:1], strict=True):
    np.testing.assert_allclose(np.asarray(x)[inside], np.asarray(y)[inside], atol=2e-5)


def test_tpus_fuse_rows_that_the_kernel_can_cut(monkeypatch):
  lengths = (64, 128, 200, 2048)
  assert not any(map(layers.fuses_attention, lengths))
  monkeypatch.setattr(layers.platform, 'target', lambda: 'tpu')
  assert [layers.fuses_attention(n) for n in lengths] == [False, True, False, True]
