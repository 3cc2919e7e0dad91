from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from exitax import layers
from exitax.layers import Precision


def test_tokens_pick_rows():
  matrix = jnp.arange(12.0).reshape(4, 3)
  got = layers.embed_tokens(matrix, jnp.asarray([[3, 0], [1, 1]]), Precision.FLOAT32)
  np.testing.assert_array_equal(got, [[[9, 10, 11], [0, 1, 2]], [[3, 4, 5], [3, 4, 5]]])


def test_repeated_tokens_add_up_their_gradients():
  matrix = jnp.ones((4, 3))

  def loss(matrix):
    return jnp.sum(layers.embed_tokens(matrix, jnp.asarray([1, 1, 3]), Precision.FLOAT32))

  np.testing.assert_array_equal(jax.grad(loss)(matrix)[:, 0], [0, 2, 0, 1])


def test_logits_are_products_with_every_row(x64):
  rng = np.random.default_rng(0)
  matrix, features = rng.normal(size=(7, 5)), rng.normal(size=(2, 3, 5))
  got = layers.vocab_logits(jnp.asarray(matrix), jnp.asarray(features), Precision.FLOAT64)
  np.testing.assert_allclose(got, features @ matrix.T, atol=1e-14)


def test_bfloat16_logits_come_in_float32():
  rng = np.random.default_rng(1)
  matrix = jnp.asarray(rng.normal(size=(7, 64)), jnp.float32)
  features = jnp.asarray(rng.normal(size=(2, 64)), jnp.bfloat16)
  got = layers.vocab_logits(matrix, features, Precision.BFLOAT16)
  assert got.dtype == jnp.float32
  assert layers.embed_tokens(matrix, jnp.asarray([2]), Precision.BFLOAT16).dtype == jnp.bfloat16
  rounded = np.asarray(matrix.astype(jnp.bfloat16), np.float64)
  np.testing.assert_allclose(
    got, np.asarray(features, np.float64) @ rounded.T, rtol=1e-4, atol=1e-4
  )


def test_matrix_names_its_axes():
  box = layers.VocabMatrix(300, 20, 0.1).init(jax.random.key(0))['params']['matrix']
  assert box.names == ('vocab', 'embed')
  assert box.value.shape == (300, 20)
  assert 0.095 < float(jnp.std(box.value)) < 0.105
