"""Causal attention within packed rows, in blocks that skip what lies after the queries.

Nothing of the size of the square of the length outlives a block of queries: the backward computes a
block's weights again from its logits and their kept log-sum-exp, as FlashAttention does (arXiv
2205.14135, section 3.1). On the CPU, where memory is plenty and arithmetic dear, they are kept.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exitax.layers import platform
from exitax.layers.kernels import MASKED_LOGIT
from exitax.layers.linear import contract

MIN_BLOCK = 64  # Queries; smaller products run slower than what they skip.
MAX_BLOCKS = 8  # Beyond, a program grows more than it gains: 8 blocks do 9/16 of the square.


class Weights(enum.Enum):
  """What happens to attention weights between forward and backward."""

  KEPT = 'kept'
  RECOMPUTED = 'recomputed'


def causal_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array
) -> jax.Array:
  """Softmax attention of tokens to themselves and earlier ones in the row.

  Equal to `dot_product_attention` with `mask` narrowed to keys at or before each query. The queries
  are taken in blocks, later keys are not computed, and the gradient is written by hand.

  Args:
    query: `[batch, length, num_heads, head_dim]`.
    key: `[batch, length, num_kv_heads, head_dim]`.
    value: like `key`.
    mask: bool `[batch, length, length]`; every query must see at least itself.

  Returns:
    `[batch, length, num_heads, head_dim]` in the dtype of `query`.
  """
  mask = mask & np.tri(query.shape[1], dtype=bool)
  weights = Weights.KEPT if platform.on_cpu() else Weights.RECOMPUTED
  return blocked_attention(query, key, value, mask, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, weights: Weights
) -> jax.Array:
  """`dot_product_attention` for a lower-triangular `mask`, a block of queries at a time."""
  return _forward(query, key, value, mask, weights)[0]


def attention_blocks(length: int) -> list[tuple[int, int]]:
  """Start and stop of each block of queries; a block sees the keys before its stop."""
  size = max(MIN_BLOCK, -(-length // MAX_BLOCKS))
  return [(start, min(start + size, length)) for start in range(0, length, size)]


def _forward(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, weights: Weights
) -> Any:
  num_kv_heads = key.shape[2]
  q, k, v = (_heads_first(x, num_kv_heads) for x in (query, key, value))
  k, v = k[:, :, 0], v[:, :, 0]
  outputs, kept = [], []
  for start, stop in attention_blocks(query.shape[1]):
    logits = _logits(q, k, mask, start, stop)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    weight = _fold((exponentials / total).astype(query.dtype))
    mixed = contract(weight, v[:, :, :stop], ((3,), (2,)), num_batch=2)
    kept.append(weight if weights is Weights.KEPT else top + jnp.log(total))
    outputs.append(_unfold(mixed, stop - start))
    if weights is Weights.RECOMPUTED:
      q, outputs[-1] = _in_order(q, outputs[-1])
  output = _tokens_first(jnp.concatenate(outputs, axis=3)).astype(query.dtype)
  return output, (q, k, v, mask, kept, output)


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array, start: int, stop: int) -> jax.Array:
  """Of one block of queries, `[batch, kv_heads, group, stop - start, stop]`."""
  logits = contract(_fold(q[:, :, :, start:stop]), k[:, :, :stop], ((3,), (3,)), num_batch=2)
  logits = _unfold(logits, stop - start) * q.shape[-1] ** -0.5
  return jnp.where(mask[:, None, None, start:stop, :stop], logits, MASKED_LOGIT)


def _backward(weights: Weights, residuals: Any, gradient: jax.Array) -> Any:
  q, k, v, mask, kept, output = residuals
  num_kv_heads = k.shape[1]
  dtype, length, head_dim = q.dtype, q.shape[3], q.shape[4]
  wide = jnp.promote_types(dtype, jnp.float32)
  scale = head_dim**-0.5
  # Sum over keys of weight * d_weight, as in FlashAttention (arXiv 2205.14135, B.4).
  along = jnp.sum(gradient.astype(wide) * output.astype(wide), axis=-1, keepdims=True)
  along = _heads_first(along, num_kv_heads)
  g = _heads_first(gradient, num_kv_heads)
  d_q, d_k, d_v = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
  for (start, stop), block in zip(attention_blocks(length), kept, strict=True):
    if weights is Weights.KEPT:
      weight = block
    else:
      weight = _fold(jnp.exp(_logits(q, k, mask, start, stop) - block).astype(dtype))
    q_block, g_block = _fold(q[:, :, :, start:stop]), _fold(g[:, :, :, start:stop])
    d_weight = contract(g_block, v[:, :, :stop], ((3,), (3,)), num_batch=2)
    d_logits = weight * (d_weight - _fold(along[:, :, :, start:stop])) * scale
    d_logits = d_logits.astype(dtype)
    d_q.append(_unfold(contract(d_logits, k[:, :, :stop], ((3,), (2,)), num_batch=2), stop - start))
    later = ((0, 0), (0, 0), (0, length - stop), (0, 0))
    d_k += jnp.pad(contract(d_logits, q_block, ((2,), (2,)), num_batch=2), later)
    d_v += jnp.pad(contract(weight, g_block, ((2,), (2,)), num_batch=2), later)
    if weights is Weights.RECOMPUTED:
      (q, g), (d_k, d_v) = _in_order((q, g), (d_k, d_v))
  d_query = _tokens_first(jnp.concatenate(d_q, axis=3))
  d_key, d_value = (_tokens_first(x[:, :, None]) for x in (d_k, d_v))
  return d_query.astype(dtype), d_key.astype(dtype), d_value.astype(dtype), None


blocked_attention.defvjp(_forward, _backward)


def _in_order(operands: Any, results: Any) -> Any:
  """Both as they are, but whatever reads the operands from here on waits for the results.

  Blocks do not depend on each other: left free, the compiler keeps the logits of several at once.
  """
  return jax.lax.optimization_barrier((operands, results))


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
