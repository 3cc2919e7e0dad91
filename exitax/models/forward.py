"""The cache-free forward pass over packed batches: for training, scoring and oracles."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from exitax.layers import (
  AttendFn,
  causal_attention,
  dot_product_attention,
  fuses_attention,
  sharing_mask,
  splash_attention,
)
from exitax.models.dropout import Dropout
from exitax.models.exit_lm import ExitLM, Params


def packed_mask(
  segment_ids: jax.Array, positions: jax.Array, sliding_window: int | None
) -> jax.Array:
  """Who sees whom in a packed batch: bool `[batch, queries, keys]`.

  A query sees keys of its own document (equal segment ids) at its own or an earlier place in the
  row, and no further back than the sliding window. Padding (segment 0) sees padding only.

  Args:
    segment_ids: i32 `[batch, length]`.
    positions: i32 `[batch, length]`, rising within a document.
    sliding_window: number of latest positions that are seen, or None.
  """
  query, key = segment_ids[:, :, None], segment_ids[:, None, :]
  distance = positions[:, :, None] - positions[:, None, :]
  mask = (query == key) & (distance >= 0)
  if sliding_window is not None:
    mask &= distance < sliding_window
  return mask


def packed_attend(
  segment_ids: jax.Array, positions: jax.Array, sliding_window: int | None
) -> AttendFn:
  """An `AttendFn` for packed rows `[batch, length, heads, head_dim]` that keeps no state.

  Sees what `packed_mask` says. On TPUs and rows that suit it a fused kernel attends, which takes
  the positions of a document to be consecutive.

  Args:
    segment_ids: i32 `[batch, length]`.
    positions: i32 `[batch, length]`, rising within a document.
    sliding_window: number of latest positions that are seen, or None.
  """
  if fuses_attention(segment_ids.shape[1]):

    def fused(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
      mixed = splash_attention(query, key, value, segment_ids, sliding_window=sliding_window)
      return mixed, None

    return fused
  mask = packed_mask(segment_ids, positions, sliding_window)

  def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
    return causal_attention(query, key, value, mask), None

  return attend


def group_attend(
  origin: Any, segment_ids: jax.Array, positions: jax.Array, sliding_window: int | None
) -> AttendFn:
  """An `AttendFn` for rows in which the texts of a group lie, step after step; it keeps no state.

  Sees what `sharing_mask` says; padding sees padding.

  Args:
    origin: an `Origin`, or anything with its fields, `[batch, length]` each.
    segment_ids: i32 `[batch, length]`; 0 is padding.
    positions: i32 `[batch, length]`.
    sliding_window: number of latest positions that are seen, or None.
  """
  mask = sharing_mask(origin, origin, positions, positions)
  mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
  if sliding_window is not None:
    mask &= positions[:, :, None] - positions[:, None, :] < sliding_window

  def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
    return dot_product_attention(query, key, value, mask), None

  return attend


def features_at_exits(
  model: ExitLM,
  params: Params,
  tokens: jax.Array,
  segment_ids: jax.Array,
  positions: jax.Array,
  *,
  origin: Any = None,
  dropout: Dropout | None = None,
  depth: int | None = None,
) -> tuple[jax.Array, ...]:
  """What every exit's vocabulary matrix reads, shallow to deep, the final head last.

  Args:
    model: the model.
    params: parameters with stacked blocks.
    tokens: i32 `[batch, length]`.
    segment_ids: i32 `[batch, length]`; 0 is padding.
    positions: i32 `[batch, length]`, each less than the length; with `origin`, than the context.
    origin: whose each token is, in rows that the texts of a group share (see `group_attend`); None elsewhere.
    dropout: what a training step drops; None outside of training.
    depth: how many layers to run: the exits up to there, and no final head; None runs all.

  Returns:
    One `[batch, length, embed]` per exit, in the model's compute dtype.
  """
  if origin is None:
    rotary = model.rotary(positions, below=positions.shape[-1])
    attend = packed_attend(segment_ids, positions, model.config.sliding_window)
  else:
    rotary = model.rotary(positions, below=model.config.max_length)
    attend = group_attend(origin, segment_ids, positions, model.config.sliding_window)
  hidden = model.embed(params, tokens)
  if dropout is not None:
    hidden = dropout.drop_embedding(hidden)
  kept = model.hidden_at_exits(
    params, hidden, rotary=rotary, attend=attend, dropout=dropout, depth=depth
  )
  heads = (*model.config.exits, None)[: kept.shape[0]]
  return tuple(
    model.exit_features(params, head, kept[i], rotary=rotary, attend=attend)[0]
    for i, head in enumerate(heads)
  )


def logits_at_exits(
  model: ExitLM,
  params: Params,
  tokens: jax.Array,
  segment_ids: jax.Array,
  positions: jax.Array,
  *,
  origin: Any = None,
) -> jax.Array:
  """Every exit's scores, `[num_exits + 1, batch, length, vocab]`: small models and oracles only."""
  features = features_at_exits(model, params, tokens, segment_ids, positions, origin=origin)
  heads = (*model.config.exits, None)
  return jnp.stack([model.logits(params, head, x) for head, x in zip(heads, features, strict=True)])
