"""Softmax attention, and the choice of its kernel by platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from exitax.layers import platform
from exitax.layers.int8 import Int8, split_scale
from exitax.layers.rotary import Rotary, rotate

# Large and finite: a query that sees nothing (padding) gets uniform weights instead of NaN.
MASKED_LOGIT = -1e30

# Queries of a key head that the CPU multiplies one by one (see `_scores_of_keys`).
MAX_VECTOR_PRODUCTS = 8


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
  logits = jnp.einsum('bqkgd,bskd->bkgqs', grouped, key, preferred_element_type=wide)
  # Scaled after the product: in bfloat16 the factor itself would be off by up to 0.4 %.
  logits = jnp.where(mask[:, None, None], logits * head_dim**-0.5, MASKED_LOGIT)
  weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
  mixed = jnp.einsum('bkgqs,bskd->bqkgd', weights, value, preferred_element_type=wide)
  return mixed.reshape(query.shape).astype(query.dtype)


def cached_attention(
  query: jax.Array, key: jax.Array | Int8, value: jax.Array | Int8, mask: jax.Array
) -> jax.Array:
  """`dot_product_attention` over head-major keys, as a decoding cache keeps them.

  With heads before keys both products are matrix products over the cache as it lies; key-major
  caches are transposed by XLA on the CPU, one copy of the whole cache per layer and step.

  Args:
    query: `[rows, lanes, num_heads, head_dim]`.
    key: `[rows, num_kv_heads, keys, head_dim]`; in 8 bits with a scale per key.
    value: like `key`.
    mask: bool `[rows, lanes, keys]`; True where the query sees the key.

  Returns:
    `[rows, lanes, num_heads, head_dim]` in the dtype of `query`.
  """
  rows, lanes, num_heads, head_dim = query.shape
  num_kv_heads, num_keys = key.shape[1:3]
  group = num_heads // num_kv_heads
  scaled = query * jnp.asarray(head_dim**-0.5, query.dtype)
  grouped = scaled.reshape(rows, lanes, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
  folded = grouped.reshape(rows, num_kv_heads, group * lanes, head_dim)
  keys, key_scale = split_scale(key)
  logits = _scores_of_keys(folded, keys.astype(query.dtype))
  logits = logits.reshape(rows, num_kv_heads, group, lanes, num_keys)
  if key_scale is not None:
    logits = logits * key_scale[:, :, None, None, :, 0]
  logits = jnp.where(mask[:, None, None], logits, MASKED_LOGIT)
  weights = jax.nn.softmax(logits, axis=-1)
  values, value_scale = split_scale(value)
  if value_scale is not None:
    weights = weights * value_scale[:, :, None, None, :, 0]
  weights = weights.astype(query.dtype).reshape(rows, num_kv_heads, group * lanes, num_keys)
  mixed = _mix_values(weights, values.astype(query.dtype))
  mixed = mixed.reshape(rows, num_kv_heads, group, lanes, head_dim).transpose(0, 3, 1, 2, 4)
  return mixed.reshape(query.shape).astype(query.dtype)


def ragged_attention(
  query: jax.Array,
  key: jax.Array | Int8,
  value: jax.Array | Int8,
  mask: jax.Array,
  used: jax.Array,
) -> jax.Array:
  """`cached_attention` where rows use different numbers of lanes, such as groups beside single requests.

  On the CPU the first lanes of all rows are one product over the cache as it lies, and rows with more
  lanes follow one by one, each cut out of the cache: as long as these are few, padding every row to the
  lanes of the largest costs more.

  Args:
    query: `[rows, lanes, num_heads, head_dim]`.
    key: `[rows, num_kv_heads, keys, head_dim]`.
    value: like `key`.
    mask: bool `[rows, lanes, keys]`.
    used: i32 `[rows]`, lanes of the row from the first on that anybody reads.

  Returns:
    `[rows, lanes, num_heads, head_dim]`; anything in lanes beyond `used`.
  """
  rows, lanes = mask.shape[:2]
  if min(rows, lanes) == 1 or not platform.on_cpu() or platform.partitioned():
    return cached_attention(query, key, value, mask)
  wide = used > 1
  num_wide = jnp.sum(wide)

  def row_by_row() -> jax.Array:
    first = cached_attention(query[:, :1], key, value, mask[:, :1])
    wide_first = jnp.argsort(~wide)

    def attend_row(index: jax.Array, mixed: jax.Array) -> jax.Array:
      row = wide_first[index]
      cut = jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1),
        (query[:, 1:], key, value, mask[:, 1:]),
      )
      return jax.lax.dynamic_update_slice_in_dim(mixed, cached_attention(*cut), row, 0)

    others = jax.lax.fori_loop(0, num_wide, attend_row, jnp.zeros_like(query[:, 1:]))
    return jnp.concatenate([first, others], axis=1)

  return jax.lax.cond(
    2 * num_wide > rows, lambda: cached_attention(query, key, value, mask), row_by_row
  )


def turned_attention(
  query: jax.Array,
  key: jax.Array | Int8,
  value: jax.Array | Int8,
  mask: jax.Array,
  turns: Rotary,
  block: jax.Array,
) -> jax.Array:
  """`cached_attention` of queries that stand elsewhere for each block of keys.

  Keys stay as they were turned when they were cached; the query is turned once per block (Hogwild! inference,
  arXiv 2504.06261, section 3.4), which makes as many products with all keys as there are blocks.

  Args:
    query: `[rows, lanes, num_heads, head_dim]`, rotated.
    key: `[rows, num_kv_heads, keys, head_dim]`.
    value: like `key`.
    mask: bool `[rows, lanes, keys]`.
    turns: `[rows, lanes, blocks, head_dim / 2]`, by how much the query is turned on for a block.
    block: i32 `[rows, keys]`, of each key.
  """
  wide = jnp.promote_types(query.dtype, jnp.float32)
  keys, values = (
    x.dequantise(query.dtype) if isinstance(x, Int8) else x.astype(query.dtype)
    for x in (key, value)
  )
  rows, lanes, num_heads, head_dim = query.shape
  num_kv_heads = keys.shape[1]
  num_blocks = turns.cos.shape[2]
  per_block = jnp.broadcast_to(query[:, :, None], (rows, lanes, num_blocks, num_heads, head_dim))
  turned = rotate(per_block, turns) * jnp.asarray(head_dim**-0.5, query.dtype)
  grouped = turned.reshape(rows, lanes, -1, num_kv_heads, num_heads // num_kv_heads, head_dim)
  logits = jnp.einsum('rlbkgd,rksd->rkglbs', grouped, keys, preferred_element_type=wide)
  logits = jnp.take_along_axis(logits, block[:, None, None, None, None, :], axis=4)[:, :, :, :, 0]
  logits = jnp.where(mask[:, None, None], logits, MASKED_LOGIT)
  weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
  mixed = jnp.einsum('rkgls,rksd->rlkgd', weights, values, preferred_element_type=wide)
  return mixed.reshape(query.shape).astype(query.dtype)


def _scores_of_keys(queries: jax.Array, keys: jax.Array) -> jax.Array:
  """Products of `[rows, heads, n, dim]` with `[rows, heads, keys, dim]`: `[rows, heads, n, keys]`.

  XLA's matrix products on the CPU rearrange what they read first. One vector product for
  each of a few queries reads the keys as they lie, out of the processor's cache but for the first. For more
  queries, keys are better off on the left.
  """
  if not platform.on_cpu():
    return _batched(queries, keys, 3)
  if queries.shape[2] > MAX_VECTOR_PRODUCTS:
    return _batched(keys, queries, 3).swapaxes(2, 3)
  return _one_by_one(queries, keys, 3)


def _mix_values(weights: jax.Array, values: jax.Array) -> jax.Array:
  """Products of `[rows, heads, n, keys]` with `[rows, heads, keys, dim]`: `[rows, heads, n, dim]`."""
  if platform.on_cpu() and weights.shape[2] <= MAX_VECTOR_PRODUCTS:
    return _one_by_one(weights, values, 2)
  return _batched(weights, values, 2)


def _one_by_one(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  """`_batched` of `a` `[rows, heads, n, m]`, one of the n at a time."""
  products = [_batched(a[:, :, i : i + 1], b, axis) for i in range(a.shape[2])]
  return jnp.concatenate(products, axis=2)


def _batched(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
  """Sum of products over the last axis of `a` and `axis` of `b`, per row and head; float32 or wider."""
  wide = jnp.promote_types(a.dtype, jnp.float32)
  batch = ((0, 1), (0, 1))
  return jax.lax.dot_general(a, b, (((3,), (axis,)), batch), preferred_element_type=wide)
