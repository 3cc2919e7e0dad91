"""Masks by row, their frequency, and the scaling of what is kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import layers

KEY = jax.random.key(3)


def test_a_row_of_the_mask_depends_on_the_key_and_its_number_alone():
  whole = np.asarray(layers.keep_mask(KEY, jnp.arange(8), 0.5, (6, 5)))
  assert whole.shape == (8, 6, 5)
  assert whole.dtype == bool
  part = layers.keep_mask(KEY, jnp.asarray([6, 1, 3]), 0.5, (6, 5))
  np.testing.assert_array_equal(part, whole[[6, 1, 3]])
  assert len({row.tobytes() for row in whole}) == 8
  other = layers.keep_mask(jax.random.fold_in(KEY, 1), jnp.arange(8), 0.5, (6, 5))
  assert not np.array_equal(other, whole)


def test_precisions_share_masks():
  narrow = layers.keep_mask(KEY, jnp.arange(4), 0.3, (50,))
  with jax.enable_x64(True):
    wide = layers.keep_mask(KEY, jnp.arange(4, dtype=jnp.int32), 0.3, (50,))
  np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize('rate', [0.0, 0.1, 0.5, 0.9])
def test_frequency_is_the_rate(rate):
  mask = np.asarray(layers.keep_mask(KEY, jnp.arange(20), rate, (500,)))
  deviation = (rate * (1 - rate) / mask.size) ** 0.5
  assert abs(1 - mask.mean() - rate) <= 3 * deviation
  # Neither rows nor columns have a rate of their own.
  assert (abs(1 - mask.mean(1) - rate) <= 4.5 * (rate * (1 - rate) / 500) ** 0.5).all()
  assert (abs(1 - mask.mean(0) - rate) <= 4.5 * (rate * (1 - rate) / 20) ** 0.5).all()


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_dropping_units_keeps_the_mean(dtype):
  x = jnp.asarray(np.random.default_rng(0).normal(1.0, 0.5, size=(10, 30)), dtype)
  rate, draws = 0.3, 2000
  keys = jax.random.split(KEY, draws)
  dropped = jax.vmap(lambda key: layers.drop_units(x, key, jnp.arange(10), rate))(keys)
  assert dropped.dtype == dtype
  wide, dropped = np.asarray(x, np.float64), np.asarray(dropped, np.float64)
  # Each entry is zero, or x / (1 - rate) as its dtype rounds it.
  kept = dropped != 0
  rounding = float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(
    np.where(kept, dropped, 0), np.where(kept, wide / (1 - rate), 0), rtol=rounding
  )
  deviation = np.abs(wide) * (rate / (1 - rate) / draws) ** 0.5
  assert (np.abs(dropped.mean(0) - wide) <= 4.5 * deviation + rounding * np.abs(wide)).all()
  total = np.sqrt(np.sum(deviation**2))
  # Rounding goes either way: the sum is nearer than its parts.
  assert abs(dropped.mean(0).sum() - wide.sum()) <= 3 * total + 1e-3 * wide.sum()


def test_the_gradient_is_dropped_and_scaled_as_the_value():
  x = jnp.ones((3, 40))
  value, pull_back = jax.vjp(lambda x: layers.drop_units(x, KEY, jnp.arange(3), 0.25), x)
  np.testing.assert_array_equal(pull_back(jnp.ones_like(x))[0], value)
  assert {0.0, float(np.float32(1 / 0.75))} == set(np.asarray(value).ravel().tolist())
