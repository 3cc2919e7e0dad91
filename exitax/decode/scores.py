"""Scores over the vocabulary for a few tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from exitax.models import ExitConfig, ExitLM, Params


def exit_logits(
  model: ExitLM, params: Params, exit_config: ExitConfig | None, features: jax.Array
) -> jax.Array:
  """`ExitLM.logits` of `[rows, embed]` features, `[rows, vocab]`, with the matrix on the left.

  On the CPU a product of a few rows with a transposed matrix transposes the matrix first: 13 ms
  instead of 2 for `[4096, 512]` and 4 rows. The barrier keeps XLA from turning the product round.
  """
  dtype = model.config.precision.dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  matrix = model.vocab_matrix(params, exit_config).astype(dtype)
  contracted = (((1,), (1,)), ((), ()))
  scores = jax.lax.dot_general(
    matrix, features.astype(dtype), contracted, preferred_element_type=wide
  )
  return jax.lax.optimization_barrier(scores).T
