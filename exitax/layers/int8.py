"""Arrays in 8 bits, with a scale per channel: for decoding, which is bound by reading them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

_LARGEST = 127


@struct.dataclass
class Int8:
  """`values * scale` stands for an array; symmetric, so that zero is exact.

  Attributes:
    values: int8, the array's shape.
    scale: f32, the same shape with 1 for the axes that share a scale.
  """

  values: jax.Array
  scale: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """The array's shape."""
    return self.values.shape

  def dequantise(self, dtype: Any) -> jax.Array:
    """The array, in `dtype`."""
    return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantise(array: jax.Array, axes: Sequence[int]) -> Int8:
  """Rounds to the nearest of 255 steps between the extremes over `axes`, which share a scale."""
  array = array.astype(jnp.float32)
  extreme = jnp.max(jnp.abs(array), axis=tuple(axes), keepdims=True)
  # A channel of zeros keeps a scale that can be divided by.
  scale = jnp.where(extreme > 0, extreme, 1.0) / _LARGEST
  return Int8(values=jnp.round(array / scale).astype(jnp.int8), scale=scale)


def quantise_matrices(params: Any) -> Any:
  """A tree of parameters with linear maps in 8 bits per output channel, vocabulary per row.

  Norms, biases and everything else that is not a matrix stay. Also for joined maps and unstacked
  blocks; of stacked ones (with a leading axis of layers) it would share scales between layers.
  """
  return jax.tree_util.tree_map_with_path(_quantise_leaf, params)


def split_scale(array: jax.Array | Int8) -> tuple[jax.Array, jax.Array | None]:
  """What is stored, and the scale to multiply a product with (None for a plain array)."""
  return (array.values, array.scale) if isinstance(array, Int8) else (array, None)


def _quantise_leaf(path: Any, leaf: jax.Array) -> Any:
  names = [str(getattr(key, 'key', '')) for key in path]
  if names[-1] == 'matrix':
    return quantise(leaf, (1,))
  if names[-1] != 'kernel' or leaf.ndim < 2:
    return leaf
  # Attention's output map reads two axes, heads and their width; all others read one.
  return quantise(leaf, (0, 1) if names[-2] == 'output' else (0,))
