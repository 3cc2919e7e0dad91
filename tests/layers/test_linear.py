from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from exitax import layers
from exitax.layers import Precision, linear


def _linear(precision: Precision, *, use_bias: bool = True) -> layers.Linear:
  return layers.Linear(
    features=(3, 5),
    axes_in=('heads', 'kv'),
    axes_out=('mlp', 'embed'),
    precision=precision,
    init_std=0.5,
    use_bias=use_bias,
  )


def test_contracts_several_axes_and_adds_the_bias(x64):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 7, 4, 6))
  kernel, bias = rng.normal(size=(4, 6, 3, 5)), rng.normal(size=(3, 5))
  variables = {'params': {'kernel': jnp.asarray(kernel), 'bias': jnp.asarray(bias)}}
  got = _linear(Precision.FLOAT64).apply(variables, jnp.asarray(x))
  np.testing.assert_allclose(got, np.einsum('blij,ijkm->blkm', x, kernel) + bias, atol=1e-13)


def test_bfloat16_operands_accumulate_in_float32():
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(3, 2048)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(2048, 4)), jnp.float32)
  got = layers.project(x, kernel, Precision.BFLOAT16)
  assert got.dtype == jnp.bfloat16
  rounded = [np.asarray(v.astype(jnp.bfloat16), np.float64) for v in (x, kernel)]
  wanted = rounded[0] @ rounded[1]
  # One rounding of the result, 2^-8 relative, and nothing that grows with the 2048 terms.
  np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=2**-8, atol=1e-2)


def test_gradients_are_those_of_the_matrix_product(x64):
  rng = np.random.default_rng(2)
  x, kernel, up = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 5)), rng.normal(size=(2, 3, 5))

  def loss(x, kernel):
    return jnp.sum(layers.project(x, kernel, Precision.FLOAT64) * up)

  d_x, d_kernel = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), jnp.asarray(kernel))
  np.testing.assert_allclose(d_x, up @ kernel.T, atol=1e-13)
  np.testing.assert_allclose(d_kernel, np.einsum('bli,blo->io', x, up), atol=1e-13)


def test_bfloat16_gradients_follow_float32():
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)
  kernel = jnp.asarray(rng.normal(size=(16, 12)), jnp.float32)
  up = jnp.asarray(rng.normal(size=(2, 8, 12)), jnp.float32)

  def loss(x, kernel, precision):
    return jnp.sum(layers.project(x, kernel, precision).astype(jnp.float32) * up)

  gradient = jax.grad(loss, argnums=(0, 1))
  narrow = gradient(x, kernel, Precision.BFLOAT16)
  wide = gradient(x, kernel, Precision.FLOAT32)
  for got, wanted in zip(narrow, wide, strict=True):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, atol=0.02 * float(jnp.abs(wanted).max()))


def test_emulated_bfloat16_products_are_those_of_the_hardware(monkeypatch):
  """Products of bfloat16 pairs are exact in float32, so only the order of summation differs."""
  rng = np.random.default_rng(4)
  x = jnp.asarray(rng.normal(size=(2, linear.MIN_ROWS_TO_WIDEN, 32)), jnp.bfloat16)
  kernel = jnp.asarray(rng.normal(size=(32, 24)), jnp.float32)
  up = jnp.asarray(rng.normal(size=(2, linear.MIN_ROWS_TO_WIDEN, 24)), jnp.bfloat16)

  def results(emulates):
    monkeypatch.setattr(layers.platform, 'emulates_bfloat16', lambda: emulates)
    y, vjp = jax.vjp(lambda x, k: layers.project(x, k, Precision.BFLOAT16), x, kernel)
    return y, *vjp(up)

  for got, wanted in zip(results(True), results(False), strict=True):
    assert got.dtype == wanted.dtype
    got, wanted = (np.asarray(array, np.float32) for array in (got, wanted))
    np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=1e-4)


def test_kernel_gradient_of_bfloat16_is_not_rounded():
  x = jnp.ones((4, 1), jnp.bfloat16)
  up = jnp.asarray([[256.0], [1.0], [1.0], [1.0]], jnp.bfloat16)  # 259 is no bfloat16 number.
  _, vjp = jax.vjp(lambda k: layers.project(x, k, Precision.BFLOAT16), jnp.ones((1, 1)))
  assert vjp(up)[0].item() == 259.0


def test_axes_stay_apart_under_a_mesh_with_equal_results(monkeypatch):
  rng = np.random.default_rng(5)
  x, kernel, up = (
    jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3, 4), (4, 5), (2, 3, 5))
  )

  def results(partitioned):
    monkeypatch.setattr(layers.platform, 'merges_axes', lambda dtype: not partitioned)
    y, vjp = jax.vjp(lambda x, k: layers.project(x, k, Precision.FLOAT32), x, kernel)
    return y, *vjp(up)

  for got, wanted in zip(results(True), results(False), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_initial_kernel_has_the_given_spread_and_axes():
  variables = layers.Linear(
    features=(100,),
    axes_in=('embed',),
    axes_out=('mlp',),
    precision=Precision.FLOAT32,
    init_std=0.3,
  ).init(jax.random.key(0), jnp.zeros((1, 100)))
  box = variables['params']['kernel']
  assert box.names == ('embed', 'mlp')
  assert 0.29 < float(jnp.std(box.value)) < 0.31
  biased = nn.meta.unbox(_linear(Precision.FLOAT32).init(jax.random.key(0), jnp.zeros((1, 4, 6))))
  assert not biased['params']['bias'].any()
  plain = _linear(Precision.FLOAT32, use_bias=False).init(jax.random.key(0), jnp.zeros((1, 4, 6)))
  assert set(plain['params']) == {'kernel'}
