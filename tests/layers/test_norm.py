from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from exitax import layers


def test_rms_normalise_is_the_formula(x64):
  rng = np.random.default_rng(0)
  x, scale = rng.normal(size=(3, 4, 6)), rng.normal(size=6)
  got = layers.rms_normalise(jnp.asarray(x), jnp.asarray(scale), 1e-3)
  wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale
  np.testing.assert_allclose(got, wanted, atol=1e-14)


def test_bfloat16_is_normalised_in_float32():
  rng = np.random.default_rng(1)
  x = jnp.asarray(100 * rng.normal(size=(4, 64)), jnp.bfloat16)
  scale = jnp.asarray(rng.normal(size=64), jnp.float32)
  got = layers.rms_normalise(x, scale, 1e-5)
  assert got.dtype == jnp.bfloat16
  wanted = layers.rms_normalise(x.astype(jnp.float32), scale, 1e-5).astype(jnp.bfloat16)
  np.testing.assert_array_equal(got, wanted)


def test_a_zero_vector_stays_zero_with_a_finite_gradient():
  def total(x: jax.Array) -> jax.Array:
    return jnp.sum(layers.rms_normalise(x, jnp.ones(4), 1e-5))

  value, gradient = jax.value_and_grad(total)(jnp.zeros((2, 4)))
  assert value == 0
  assert np.isfinite(gradient).all()


def test_module_starts_as_plain_normalisation():
  x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 8)), jnp.float32)
  norm = layers.RMSNorm(1e-6, 'kv')
  variables = norm.init(jax.random.key(0), x)
  assert variables['params']['scale'].names == ('kv',)
  got = norm.apply(jax.tree.map(jnp.asarray, variables), x)
  np.testing.assert_allclose(jnp.mean(got**2, -1), 1.0, rtol=1e-5)
