"""Softmax attention, and the choice of its kernel by platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Large and finite: a query that sees nothing (padding) gets uniform weights instead of NaN.
MASKED_LOGIT = -1e30


def dot_product_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
  """Softmax attention with grouped queries; the softmax is computed in at least float32.

  Args:
    query: `[batch, queries, num_heads, head_dim]`.
    key: `[batch, keys, num_kv_heads, head_dim]`; head h of the queries reads key head
      `h // (num_heads / num_kv_heads)`.
    value: like `key`.
    mask: bool `[batch, queries, keys]`; True where the query sees the key.

  Returns:
    `[batch, queries, num_heads, head_dim]` in the dtype of `query`.
  """
  batch, num_queries, num_heads, head_dim = query.shape
  num_kv_heads = key.shape[-2]
  wide = jnp.promote_types(query.dtype, jnp.float32)
  grouped = query.reshape(batch, num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
  scaled = grouped * jnp.asarray(head_dim**-0.5, grouped.dtype)
  logits = jnp.einsum('bqkgd,bskd->bkgqs', scaled, key, preferred_element_type=wide)
  logits = jnp.where(mask[:, None, None], logits, MASKED_LOGIT)
  weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
  mixed = jnp.einsum('bkgqs,bskd->bqkgd', weights, value, preferred_element_type=wide)
  return mixed.reshape(query.shape).astype(query.dtype)
