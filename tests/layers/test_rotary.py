from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from exitax import layers
from exitax.errors import UserError
from exitax.layers import RopeConfig, RopeScaling

LLAMA3 = RopeConfig(
  theta=500_000.0,
  scaling=RopeScaling.LLAMA3,
  factor=8.0,
  original_length=8192,
  low_frequency_factor=1.0,
  high_frequency_factor=4.0,
)
YARN = RopeConfig(theta=10_000.0, scaling=RopeScaling.YARN, factor=4.0, original_length=4096)


def _llama3_frequency(frequency: float, config: RopeConfig) -> float:
  """Meta's `apply_scaling`, one frequency at a time."""
  wavelength = 2 * math.pi / frequency
  low_wavelength = config.original_length / config.low_frequency_factor
  high_wavelength = config.original_length / config.high_frequency_factor
  if wavelength < high_wavelength:
    return frequency
  if wavelength > low_wavelength:
    return frequency / config.factor
  smooth = (config.original_length / wavelength - config.low_frequency_factor) / (
    config.high_frequency_factor - config.low_frequency_factor
  )
  return (1 - smooth) * frequency / config.factor + smooth * frequency


def test_plain_frequencies_are_the_geometric_series():
  got = layers.inverse_frequencies(RopeConfig(theta=100.0), 8)
  np.testing.assert_allclose(got, [1.0, 100**-0.25, 0.1, 100**-0.75], rtol=1e-15)


def test_linear_scaling_divides_every_frequency():
  plain = layers.inverse_frequencies(RopeConfig(theta=100.0), 8)
  scaled = layers.inverse_frequencies(
    RopeConfig(theta=100.0, scaling=RopeScaling.LINEAR, factor=4.0), 8
  )
  np.testing.assert_allclose(scaled, plain / 4, rtol=1e-15)


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
  plain = layers.inverse_frequencies(RopeConfig(theta=LLAMA3.theta), 128)
  got = layers.inverse_frequencies(LLAMA3, 128)
  np.testing.assert_allclose(got, [_llama3_frequency(f, LLAMA3) for f in plain], rtol=1e-12)
  kept, divided = got == plain, np.isclose(got, plain / 8, rtol=1e-12)
  assert kept.any()
  assert divided.any()
  assert (~kept & ~divided).any()


def test_yarn_interpolates_between_the_two_correction_channels():
  """The paper's section 3.2 for d=128, base 10000, 4096 tokens: the ramp runs from 20 to 46."""
  head_dim = 128
  plain = layers.inverse_frequencies(RopeConfig(theta=YARN.theta), head_dim)
  got = layers.inverse_frequencies(YARN, head_dim)

  def channel(rotations: float) -> float:
    return head_dim * np.log(4096 / (rotations * 2 * np.pi)) / (2 * np.log(10_000.0))

  low, high = math.floor(channel(32.0)), math.ceil(channel(1.0))
  assert (low, high) == (20, 46)
  for i in range(head_dim // 2):
    extrapolated = 1 - min(max((i - low) / (high - low), 0.0), 1.0)
    wanted = extrapolated * plain[i] + (1 - extrapolated) * plain[i] / 4
    assert got[i] == pytest.approx(wanted, rel=1e-12)
  rotary = layers.make_rotary(YARN, head_dim, jnp.zeros(1, jnp.int32))
  np.testing.assert_allclose(rotary.cos, 0.1 * math.log(4.0) + 1, rtol=1e-6)


def test_rotation_is_multiplication_by_a_complex_number(x64):
  rng = np.random.default_rng(0)
  config = RopeConfig(theta=50.0)
  x = rng.normal(size=(2, 5, 3, 8))
  positions = rng.integers(0, 40, size=(2, 5))
  rotary = layers.make_rotary(config, 8, jnp.asarray(positions))
  got = layers.rotate(jnp.asarray(x), rotary)
  phase = np.exp(1j * positions[..., None] * layers.inverse_frequencies(config, 8))
  turned = (x[..., :4] + 1j * x[..., 4:]) * phase[:, :, None]
  np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=1e-13)


def test_rotation_keeps_norms_and_position_zero():
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(6, 2, 8)), jnp.float32)
  rotary = layers.make_rotary(RopeConfig(), 8, jnp.asarray([0, 1, 5, 100, 1000, 9999]))
  turned = layers.rotate(x, rotary)
  np.testing.assert_allclose(
    jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
  )
  np.testing.assert_array_equal(turned[0], x[0])
  assert not np.allclose(turned[1], x[1], atol=1e-3)


def test_scores_depend_on_the_distance_alone(x64):
  rng = np.random.default_rng(2)
  query, key = jnp.asarray(rng.normal(size=(2, 1, 1, 8)))

  def score(query_position: int, key_position: int) -> float:
    at = [
      layers.make_rotary(RopeConfig(), 8, jnp.asarray([p])) for p in (query_position, key_position)
    ]
    return float(jnp.sum(layers.rotate(query, at[0]) * layers.rotate(key, at[1])))

  assert score(7, 3) == pytest.approx(score(1004, 1000), abs=1e-10)
  assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_bfloat16_is_turned_in_float32():
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.normal(size=(4, 2, 8)), jnp.bfloat16)
  rotary = layers.make_rotary(RopeConfig(), 8, jnp.arange(4))
  got = layers.rotate(x, rotary)
  assert got.dtype == jnp.bfloat16
  wanted = layers.rotate(x.astype(jnp.float32), rotary).astype(jnp.bfloat16)
  np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
  ('values', 'words'),
  [
    ({'scaling': 'ntk'}, "RopeConfig.scaling='ntk' is not known: choose 'none', 'linear'"),
    ({'theta': 1.0}, 'theta=1.0'),
    ({'scaling': 'linear', 'factor': 0.0}, 'factor=0.0'),
    ({'original_length': 0}, 'original_length=0'),
    ({'scaling': 'llama3', 'high_frequency_factor': 1.0}, 'high_frequency_factor=1.0 must exceed'),
  ],
)
def test_bad_values_are_named(values, words):
  with pytest.raises(UserError, match=words):
    RopeConfig(**values)


def test_scaling_is_given_by_its_value_too():
  assert RopeConfig(scaling='yarn').scaling is RopeScaling.YARN


def test_angles_looked_up_are_those_computed(x64):
  positions = jnp.asarray([[0, 1, 7], [99, 3, 0]])
  computed = layers.make_rotary(YARN, 16, positions)
  looked_up = layers.make_rotary(YARN, 16, positions, below=100)
  for x, y in zip(jax.tree.leaves(looked_up), jax.tree.leaves(computed), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-13)
