from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from exitax.layers import mlp


def _plain(gate, up):
  return jax.nn.silu(gate) * up


def _inputs(dtype):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(scale=3, size=(4, 5, 6)), dtype) for _ in range(3)]


def test_gate_and_its_gradient_are_those_of_autodiff(x64):
  gate, up, cotangent = _inputs(jnp.float64)
  got, got_vjp = jax.vjp(mlp.gated, gate, up)
  wanted, wanted_vjp = jax.vjp(_plain, gate, up)
  np.testing.assert_allclose(got, wanted, rtol=1e-13)
  for x, y in zip(got_vjp(cotangent), wanted_vjp(cotangent), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-14)


def test_bfloat16_is_rounded_once():
  gate, up, cotangent = _inputs(jnp.bfloat16)
  wide = [x.astype(jnp.float32) for x in (gate, up, cotangent)]
  got, got_vjp = jax.vjp(mlp.gated, gate, up)
  wanted, wanted_vjp = jax.vjp(_plain, *wide[:2])
  pairs = zip((got, *got_vjp(cotangent)), (wanted, *wanted_vjp(wide[2])), strict=True)
  for x, y in pairs:
    assert x.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(x, np.float32), y, rtol=2**-8, atol=1e-6)
