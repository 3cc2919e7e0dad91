"""Root-mean-square normalisation (arXiv 1910.07467)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from exitax.layers.parameter import parameter


def rms_normalise(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
  """`x / rms(x) * scale` over the last axis, computed in at least float32; dtype of `x` kept."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
  return (wide * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)


class RMSNorm(nn.Module):
  """RMS normalisation of the last axis with a learned scale.

  Attributes:
    epsilon: added to the mean square.
    logical_axis: name of the normalised axis.
  """

  epsilon: float
  logical_axis: str = 'norm'

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = parameter(
      self, 'scale', nn.initializers.ones, shape=(x.shape[-1],), axes=(self.logical_axis,)
    )
    return rms_normalise(x, scale, self.epsilon)
