"""Causal attention within packed rows, in blocks that skip what lies after the queries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exitax.layers import platform
from exitax.layers.kernels import MASKED_LOGIT, dot_product_attention
from exitax.layers.linear import contract

MIN_BLOCK = 64  # Queries; smaller products run slower than what they skip.
MAX_BLOCKS = 8  # Beyond, a program grows more than it gains: 8 blocks do 9/16 of the square.


def causal_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
  """Softmax attention of tokens to themselves and earlier ones in the row.

  Equal to `dot_product_attention` with `mask` narrowed to keys at or before each query. On the CPU
  the queries are taken in blocks, later keys are not computed, and the gradient is written by hand.

  Args:
    query: `[batch, length, num_heads, head_dim]`.
    key: `[batch, length, num_kv_heads, head_dim]`.
    value: like `key`.
    mask: bool `[batch, length, length]`; every query must see at least itself.

  Returns:
    `[batch, length, num_heads, head_dim]` in the dtype of `query`.
  """
  length = query.shape[1]
  mask = mask & np.tri(length, dtype=bool)
  if platform.on_cpu():
    return blocked_attention(query, key, value, mask)
  return dot_product_attention(query, key, value, mask)


@jax.custom_vjp
def blocked_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
  """`dot_product_attention` for a lower-triangular `mask`, a block of queries at a time."""
  return _forward(query, key, value, mask)[0]


def attention_blocks(length: int) -> list[tuple[int, int]]:
  """Start and stop of each block of queries; a block sees the keys before its stop."""
  size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
  return [(start, min(start + size, length)) for start in range(0, length, size)]


def _forward(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> Any:
  num_kv_heads = key.shape[2]
  q, k, v = (_heads_first(x, num_kv_heads) for x in (query, key, value))
  k, v = k[:, :, 0], v[:, :, 0]
  scale = query.shape[-1] ** -0.5
  outputs, weights = [], []
  for start, stop in attention_blocks(query.shape[1]):
    q_block = _fold(q[:, :, :, start:stop])
    logits = contract(q_block, k[:, :, :stop], ((3,), (3,)), num_batch=2)
    logits = _unfold(logits, stop - start) * scale
    visible = mask[:, None, None, start:stop, :stop]
    logits = jnp.where(visible, logits, MASKED_LOGIT)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    weight = _fold((exponentials / total).astype(query.dtype))
    mixed = contract(weight, v[:, :, :stop], ((3,), (2,)), num_batch=2)
    weights.append(weight)
    outputs.append(_unfold(mixed, stop - start))
  output = _tokens_first(jnp.concatenate(outputs, axis=3)).astype(query.dtype)
  return output, (q, k, v, weights, output)


def _backward(residuals: Any, gradient: jax.Array) -> Any:
  q, k, v, weights, output = residuals
  num_kv_heads = k.shape[1]
  dtype, length, head_dim = q.dtype, q.shape[3], q.shape[4]
  wide = jnp.promote_types(dtype, jnp.float32)
  scale = head_dim**-0.5
  # Sum over keys of weight * d_weight, as in FlashAttention (arXiv 2205.14135, B.4).
  along = jnp.sum(gradient.astype(wide) * output.astype(wide), axis=-1, keepdims=True)
  along = _heads_first(along, num_kv_heads)
  g = _heads_first(gradient, num_kv_heads)
  d_q, d_k, d_v = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
  for (start, stop), weight in zip(attention_blocks(length), weights, strict=True):
    q_block, g_block = _fold(q[:, :, :, start:stop]), _fold(g[:, :, :, start:stop])
    d_weight = contract(g_block, v[:, :, :stop], ((3,), (3,)), num_batch=2)
    d_logits = weight * (d_weight - _fold(along[:, :, :, start:stop])) * scale
    d_logits = d_logits.astype(dtype)
    d_q.append(_unfold(contract(d_logits, k[:, :, :stop], ((3,), (2,)), num_batch=2), stop - start))
    later = ((0, 0), (0, 0), (0, length - stop), (0, 0))
    d_k += jnp.pad(contract(d_logits, q_block, ((2,), (2,)), num_batch=2), later)
    d_v += jnp.pad(contract(weight, g_block, ((2,), (2,)), num_batch=2), later)
  d_query = _tokens_first(jnp.concatenate(d_q, axis=3))
  d_key, d_value = (_tokens_first(x[:, :, None]) for x in (d_k, d_v))
  return d_query.astype(dtype), d_key.astype(dtype), d_value.astype(dtype), None


blocked_attention.defvjp(_forward, _backward)


def _heads_first(x: jax.Array, num_kv_heads: int) -> jax.Array:
  """`[batch, length, heads, dim]` to `[batch, kv_heads, group, length, dim]`."""
  batch, length, num_heads, dim = x.shape
  grouped = x.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, dim)
  return grouped.transpose(0, 2, 3, 1, 4)


def _tokens_first(x: jax.Array) -> jax.Array:
  """Inverse of `_heads_first`."""
  batch, num_kv_heads, group, length, dim = x.shape
  return x.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_kv_heads * group, dim)


def _fold(x: jax.Array) -> jax.Array:
  """`[batch, kv_heads, group, block, n]` to `[batch, kv_heads, group * block, n]`."""
  return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])


def _unfold(x: jax.Array, block: int) -> jax.Array:
  """Inverse of `_fold`."""
  return x.reshape(*x.shape[:2], -1, block, x.shape[3])
