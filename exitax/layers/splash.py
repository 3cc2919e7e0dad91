"""Attention of packed rows on TPUs by jax's splash kernel: scores never leave the chip's own memory.

The kernel skips what lies after the queries or in front of the window, keeps a log-sum-exp per query
for the backward, and masks by segment ids within the blocks that are left.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as masks,
)

from exitax.layers import platform
from exitax.parallel import per_shard, shards_of

LANES = 128  # The kernel's blocks are multiples of it.
MAX_BLOCK = 512


def fuses_attention(length: int) -> bool:
  """Whether packed rows of this length attend by the fused kernel, in what is being traced."""
  return platform.target() == 'tpu' and length % LANES == 0


def splash_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array,
  *,
  sliding_window: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Causal attention within the segments of packed rows, in the tensor-parallel layout as it is.

  Args:
    query: `[batch, length, num_heads, head_dim]`; a multiple of 128 tokens.
    key: `[batch, length, num_kv_heads, head_dim]`.
    value: like `key`.
    segment_ids: i32 `[batch, length]`; a query sees keys of its own segment only.
    sliding_window: number of latest tokens that a query sees; None sees all.
    interpret: runs the kernel step by step on any device: for tests.

  Returns:
    `[batch, length, num_heads, head_dim]` in the dtype of `query`.
  """
  axes = ('batch', 'length', 'heads', 'kv')
  groups = query.shape[2] // key.shape[2]
  local = functools.partial(_local_attention, sliding_window=sliding_window, interpret=interpret)
  if key.shape[2] % shards_of('heads'):
    # Shards of query heads would need parts of a key head's group: give every query its own.
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
  return per_shard(local, (axes, axes, axes, axes[:2]), axes)(query, key, value, segment_ids)


def _local_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  segment_ids: jax.Array,
  *,
  sliding_window: int | None,
  interpret: bool,
) -> jax.Array:
  length, num_heads, head_dim = query.shape[1:]
  attend = _kernel(length, num_heads, sliding_window, interpret)
  # The kernel does not scale: in float32, as the factor itself would be off in bfloat16.
  wide = jnp.promote_types(query.dtype, jnp.float32)
  scaled = (query.astype(wide) * head_dim**-0.5).astype(query.dtype)
  q, k, v = (x.swapaxes(1, 2) for x in (scaled, key, value))
  mixed: Any = jax.vmap(attend)(q, k, v, kernel.SegmentIds(q=segment_ids, kv=segment_ids))
  return mixed.swapaxes(1, 2).astype(query.dtype)


def _kernel(
  length: int, num_heads: int, sliding_window: int | None, interpret: bool
) -> kernel.SplashAttentionKernel:
  # Cached, it would keep what one trace made for another.
  shape = (length, length)
  if sliding_window is None:
    mask: masks.Mask = masks.CausalMask(shape)
  else:
    mask = masks.LocalMask(shape, window_size=(sliding_window - 1, 0), offset=0)
  block = math.gcd(length, MAX_BLOCK)
  sizes = kernel.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_q_dq=block,
    block_kv_dq=block,
  )
  return kernel.make_splash_mha(
    masks.MultiHeadMask([mask] * num_heads),
    block_sizes=sizes,
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
