import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax.layers import (
  Int8,
  Linear,
  Precision,
  embed_tokens,
  quantise,
  quantise_matrices,
  vocab_logits,
)


def _random(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_values_of_a_worked_example():
  # Extremes 2.54 and 1.27: steps of 0.02 and 0.01.
  array = jnp.array([[2.54, -0.5], [-1.0, 1.27]])
  small = quantise(array, (0,))
  np.testing.assert_array_equal(small.values, [[127, -50], [-50, 127]])
  np.testing.assert_allclose(small.scale, [[0.02, 0.01]], rtol=1e-6)
  np.testing.assert_allclose(small.dequantise(jnp.float32), array, rtol=1e-6)


def test_no_entry_is_off_by_more_than_half_a_step():
  array = _random(64, 3, 8)
  small = quantise(array, (0,))
  assert small.values.dtype == jnp.int8
  error = np.abs(np.asarray(small.dequantise(jnp.float32)) - array)
  assert (error <= np.asarray(small.scale) * 0.5001).all()
  assert error.max() > 0


def test_channels_of_zeros_stay_zero():
  small = quantise(jnp.zeros((4, 2)), (0,))
  assert np.isfinite(small.scale).all()
  assert (np.asarray(small.dequantise(jnp.float32)) == 0).all()


@pytest.mark.parametrize(
  ('shape_in', 'features', 'axes'), [((16,), (3, 4), (0,)), ((4, 4), (10,), (0, 1))]
)
def test_a_linear_map_in_8_bits_is_that_of_its_dequantised_kernel(shape_in, features, axes):
  linear = Linear(
    features=features,
    axes_in=('embed', 'kv')[: len(shape_in)],
    axes_out=('heads', 'kv')[: len(features)],
    precision=Precision.FLOAT32,
    init_std=1.0,
    use_bias=True,
  )
  x = _random(2, 5, *shape_in)
  params = linear.init(jax.random.key(0), x)['params']
  params = jax.tree.map(lambda leaf: getattr(leaf, 'value', leaf), params, is_leaf=_is_box)
  params['bias'] = jnp.asarray(_random(*features, seed=1))
  small = quantise(params['kernel'], axes)
  found = linear.apply({'params': {**params, 'kernel': small}}, x)
  exact = linear.apply({'params': {**params, 'kernel': small.dequantise(jnp.float32)}}, x)
  np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def _is_box(leaf):
  return hasattr(leaf, 'names')


def test_a_vocabulary_in_8_bits_embeds_and_scores_as_its_dequantised_matrix():
  matrix = quantise(_random(11, 16), (1,))
  wide = matrix.dequantise(jnp.float32)
  tokens = jnp.array([[3, 10], [0, 3]])
  features = _random(2, 5, 16, seed=1)
  for found, exact in (
    (
      embed_tokens(matrix, tokens, Precision.FLOAT32),
      embed_tokens(wide, tokens, Precision.FLOAT32),
    ),
    (
      vocab_logits(matrix, features, Precision.FLOAT32),
      vocab_logits(wide, features, Precision.FLOAT32),
    ),
  ):
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)


def test_norms_and_biases_are_left_alone():
  params = {
    'output': {'kernel': jnp.ones((2, 3, 4)), 'bias': jnp.ones(4)},
    'norm': {'scale': jnp.ones(4)},
    'embed': {'matrix': jnp.ones((5, 4))},
    'confidence': {'1': {'kernel': jnp.ones(4)}},
  }
  small = quantise_matrices(params)
  assert isinstance(small['output']['kernel'], Int8)
  assert small['output']['kernel'].scale.shape == (1, 1, 4)
  assert small['embed']['matrix'].scale.shape == (5, 1)
  for kept in (small['output']['bias'], small['norm']['scale'], small['confidence']['1']['kernel']):
    assert isinstance(kept, jax.Array)
