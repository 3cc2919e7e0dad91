"""Rotary position embedding (RoFormer, arXiv 2104.09864) and its context-extending scalings."""

from __future__ import annotations

import dataclasses
import enum
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from exitax.errors import UserError, choose


class RopeScaling(enum.Enum):
  """How frequencies are changed to reach beyond the pretraining length."""

  NONE = 'none'
  LINEAR = 'linear'  # Position interpolation, arXiv 2306.15595: every frequency / factor.
  LLAMA3 = 'llama3'  # Llama 3.1: long wavelengths / factor, short ones kept, a ramp between.
  YARN = 'yarn'  # arXiv 2309.00071: NTK-by-parts, and a temperature on the attention logits.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
  """Frequencies of the rotation.

  Attributes:
    theta: base of the geometric series of wavelengths.
    scaling: which scaling, if any.
    factor: how many times longer than `original_length` the context may get.
    original_length: pretraining context; used by LLAMA3 and YARN.
    low_frequency_factor: LLAMA3: wavelengths above `original_length / this` are divided by `factor`.
    high_frequency_factor: LLAMA3: wavelengths below `original_length / this` stay.
    beta_fast: YARN: rotations over `original_length` above which a frequency stays.
    beta_slow: YARN: rotations below which a frequency is divided by `factor`.
    attention_factor: YARN: factor on cos and sin; None is the paper's, 0.1 ln(factor) + 1.

  Raises:
    UserError: an unknown scaling, or a number that gives no frequencies.
  """

  theta: float = 10_000.0
  scaling: RopeScaling = RopeScaling.NONE
  factor: float = 1.0
  original_length: int = 8192
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None

  def __post_init__(self) -> None:
    scaling = choose(RopeScaling, self.scaling, name='RopeConfig.scaling')
    object.__setattr__(self, 'scaling', scaling)
    if self.theta <= 1:
      raise UserError(f'rope theta={self.theta} must be above 1')
    if self.factor <= 0 or self.original_length < 1:
      raise UserError(
        f'rope factor={self.factor} and original_length={self.original_length} must be positive'
      )
    if (
      self.scaling is RopeScaling.LLAMA3 and self.high_frequency_factor <= self.low_frequency_factor
    ):
      raise UserError(
        f'rope high_frequency_factor={self.high_frequency_factor} must exceed '
        f'low_frequency_factor={self.low_frequency_factor}'
      )


# A table is part of every program that uses it: 2 MB for heads of 128 channels.
_LONGEST_TABLE = 4096


@struct.dataclass
class Rotary:
  """Angles of one set of positions, made once and used by every layer.

  Attributes:
    cos: f32 (f64 under `jax_enable_x64`) `[..., head_dim / 2]`, leading dimensions as the positions.
    sin: likewise.
  """

  cos: jax.Array
  sin: jax.Array


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
  """Angle per position of each pair of channels, f64 `[head_dim / 2]`, after scaling."""
  exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
  frequency = config.theta**-exponent
  match config.scaling:
    case RopeScaling.NONE:
      return frequency
    case RopeScaling.LINEAR:
      return frequency / config.factor
    case RopeScaling.LLAMA3:
      return _llama3(config, frequency)
    case RopeScaling.YARN:
      return _yarn(config, frequency, head_dim)


def attention_temperature(config: RopeConfig) -> float:
  """Factor on cos and sin: 1 except under YARN (arXiv 2309.00071, eq. 22)."""
  if config.scaling is not RopeScaling.YARN:
    return 1.0
  if config.attention_factor is not None:
    return config.attention_factor
  return 0.1 * math.log(config.factor) + 1.0 if config.factor > 1.0 else 1.0


def make_rotary(
  config: RopeConfig, head_dim: int, positions: jax.Array, *, below: int | None = None
) -> Rotary:
  """Angles for `positions` (i32, any shape): `Rotary` with arrays `[*positions.shape, head_dim/2]`.

  Args:
    config: base and scaling.
    head_dim: channels of a head.
    positions: any shape.
    below: every position is less, if that is known. A few thousand positions at most are looked up
      in a table, exact to the last bit; XLA on the CPU would compute sine and cosine again wherever
      they are used.
  """
  # The widest float there is: float32, but float64 for oracles.
  wide = jax.dtypes.canonicalize_dtype(jnp.float64)
  frequency, temperature = inverse_frequencies(config, head_dim), attention_temperature(config)
  if below is not None and below <= _LONGEST_TABLE:
    angles = np.arange(below)[:, None] * frequency
    cos, sin = (jnp.asarray(fn(angles) * temperature, wide) for fn in (np.cos, np.sin))
    return Rotary(cos=cos[positions], sin=sin[positions])
  angle = positions.astype(wide)[..., None] * jnp.asarray(frequency, wide)
  return Rotary(cos=jnp.cos(angle) * temperature, sin=jnp.sin(angle) * temperature)


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
  """`x` `[..., heads, head_dim]` turned by its position's angles; dtype kept.

  Channel i is paired with channel i + head_dim / 2, as in Hugging Face's Llama checkpoints.
  """
  # Halves as an axis of two that is reversed, not cut and joined: one vectorised loop on the CPU.
  halves = x.astype(rotary.cos.dtype).reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
  cos = rotary.cos[..., None, None, :]
  sin = jnp.stack([-rotary.sin, rotary.sin], axis=-2)[..., None, :, :]
  turned = (halves * cos + jnp.flip(halves, axis=-2) * sin).reshape(x.shape)
  return turned.astype(x.dtype)


def _llama3(config: RopeConfig, frequency: np.ndarray) -> np.ndarray:
  wavelength = 2 * np.pi / frequency
  low, high = config.low_frequency_factor, config.high_frequency_factor
  ramp = np.clip((config.original_length / wavelength - low) / (high - low), 0.0, 1.0)
  return (1 - ramp) * frequency / config.factor + ramp * frequency


def _yarn(config: RopeConfig, frequency: np.ndarray, head_dim: int) -> np.ndarray:
  def channel(rotations: float) -> float:
    """The (fractional) pair of channels that turns `rotations` times over the original length."""
    ratio = config.original_length / (rotations * 2 * math.pi)
    return head_dim * math.log(ratio) / (2 * math.log(config.theta))

  low = max(math.floor(channel(config.beta_fast)), 0)
  high = min(math.ceil(channel(config.beta_slow)), head_dim - 1)
  ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
  return ramp * frequency / config.factor + (1 - ramp) * frequency
