"""How sure an exit is of its scores, in [0, 1]."""

from __future__ import annotations

import enum
import math

import jax
import jax.numpy as jnp


class Confidence(enum.Enum):
  """A measure of confidence over `logits` `[..., vocab]` at temperature 1, before any filter."""

  MAX_PROB = 'max_prob'  # The largest probability (CALM, arXiv 2207.07061).
  MARGIN = 'margin'  # The largest minus the second largest probability (the same).
  ENTROPY = 'entropy'  # 1 - H(p) / ln V.

  def __call__(self, logits: jax.Array) -> jax.Array:
    """f32 `[...]`, between 0 and 1."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    match self:
      case Confidence.MAX_PROB:
        value = jnp.exp(jnp.max(log_probs, axis=-1))
      case Confidence.MARGIN:
        top, _ = jax.lax.top_k(log_probs, 2)
        value = jnp.exp(top[..., 0]) - jnp.exp(top[..., 1])
      case Confidence.ENTROPY:
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        value = 1.0 - entropy / math.log(logits.shape[-1])
    return jnp.clip(value, 0.0, 1.0)
