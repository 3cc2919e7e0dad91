"""Tokens to vectors, and vectors to scores over the vocabulary, with one matrix layout."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from exitax.layers.config import Precision
from exitax.layers.int8 import Int8, split_scale
from exitax.layers.parameter import parameter


class VocabMatrix(nn.Module):
  """A `[vocab, embed]` matrix: an input embedding, an output head, or (tied) both.

  Attributes:
    vocab_size: rows.
    embed_dim: columns.
    init_std: standard deviation at initialisation.
  """

  vocab_size: int
  embed_dim: int
  init_std: float

  @nn.compact
  def __call__(self) -> jax.Array:
    init = nn.initializers.normal(self.init_std)
    shape = (self.vocab_size, self.embed_dim)
    return parameter(self, 'matrix', init, shape=shape, axes=('vocab', 'embed'))


def embed_tokens(matrix: jax.Array | Int8, tokens: jax.Array, precision: Precision) -> jax.Array:
  """Rows of `matrix` `[vocab, embed]` for i32 `tokens` `[...]`: `[..., embed]`."""
  values, scale = split_scale(matrix)
  rows = jnp.take(values, tokens, axis=0)
  if scale is not None:
    rows = rows * jnp.take(scale, tokens, axis=0)
  return rows.astype(precision.dtype)


def vocab_logits(matrix: jax.Array | Int8, features: jax.Array, precision: Precision) -> jax.Array:
  """Scores `[..., vocab]` of `features` `[..., embed]`, in at least float32."""
  dtype = precision.dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  values, scale = split_scale(matrix)
  scores = jnp.einsum(
    '...d,vd->...v', features.astype(dtype), values.astype(dtype), preferred_element_type=wide
  )
  return scores if scale is None else scores * scale[:, 0]
