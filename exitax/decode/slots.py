"""Slots: rows of one long-lived state that requests take and leave between steps.

All shapes are fixed by the slots, so that joining and leaving never compiles anything. A request is
prefilled alone, in a state of one row, and then copied into a free slot: running rows wait for one
chunk of a prompt at most. In a state of groups a request takes a row and a text for each of its thinkers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from exitax.decode.cache import KVCache, LayerCache
from exitax.decode.compiling import decode_jit
from exitax.decode.state import DecodeState, Requests
from exitax.decode.texts import Grouping
from exitax.layers import PROMPT, Origin


@struct.dataclass
class Gains:
  """What rows have gained: small enough to be copied to the host after every few steps.

  In a state of groups "row" means text.

  Attributes:
    tokens: i32 `[rows, width]`, each row's generated tokens from the asked number on; those at and
      after `step` are stale.
    exit_layer: i32 `[rows, width]`; this and what follows as in `ExitRecord`.
    confidence: f32 `[rows, width]`.
    log_prob: f32 `[rows, width]`.
    top_ids: i32 `[rows, width, num_top]`.
    top_log_probs: f32 `[rows, width, num_top]`.
    step: i32 `[rows]`, tokens generated in all.
    done: bool `[rows]`.
    stop_reason: i32 `[rows]`, of `StopReason`.
  """

  tokens: jax.Array
  exit_layer: jax.Array
  confidence: jax.Array
  log_prob: jax.Array
  top_ids: jax.Array
  top_log_probs: jax.Array
  step: jax.Array
  done: jax.Array
  stop_reason: jax.Array


@struct.dataclass
class CacheChunk:
  """Keys and values of some consecutive tokens of one row, in every layer.

  Attributes:
    layers: one entry per layer, `[1, num_kv_heads, chunk, head_dim]`.
    heads: as in `KVCache`.
  """

  layers: tuple[LayerCache, ...]
  heads: dict[int, LayerCache]


@decode_jit(static=(), donated=('state',))
def insert_row(
  state: DecodeState, row: DecodeState, slot: jax.Array | int, requests: Requests
) -> DecodeState:
  """`state` with `row` (a state of one row, prefilled) in row `slot`; `state` is donated.

  Args:
    state: all slots.
    row: as many columns, and of the same plan; it stays, for further samples of its prompt.
    slot: traced.
    requests: settings of the one row, in place of those of `row`.
  """
  row = dataclasses.replace(row, requests=requests)

  def put(into: jax.Array, one: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(into, jnp.asarray(one, into.dtype), slot, axis=0)

  return jax.tree.map(put, state, row)


@struct.dataclass
class NewGroup:
  """The texts of a request that joins a state of groups; its thinkers are numbered as they stand here.

  Attributes:
    place: i32 `[thinkers]`, which texts of the state they become; out of bounds for none.
    tokens: i32 `[thinkers, capacity]`, the prompt and each one's header.
    length: i32 `[thinkers]`, of these.
    shared: i32 scalar, tokens of the prompt.
    slot_width: i32 scalar, positions of each thinker.
    lag: i32 scalar, of what they see of each other, as `by_rank`.
    by_rank: bool scalar.
    requests: settings, of as many rows as there are thinkers.
  """

  place: jax.Array | np.ndarray
  tokens: jax.Array | np.ndarray
  length: jax.Array | np.ndarray
  shared: jax.Array | int
  slot_width: jax.Array | int
  lag: jax.Array | int
  by_rank: jax.Array | bool
  requests: Requests


@decode_jit(static=(), donated=('state',))
def insert_group(
  state: DecodeState, prefilled: DecodeState, row: jax.Array | int, new: NewGroup
) -> DecodeState:
  """`state` with a request in row `row`, in place of all texts that were there; `state` is donated.

  Args:
    state: of groups.
    prefilled: a state of one row, without groups, that has cached the prompt; it stays.
    row: traced.
    new: the request's texts.
  """
  group = state.group
  assert group is not None, 'a state without groups takes rows: insert_row'
  # Those who leave are nobody's texts: nothing of them is fed any more, not even that they ended.
  stay = group.row != row
  thinkers = jnp.arange(new.place.shape[0])

  def put(into: jax.Array, values: Any) -> jax.Array:
    return jnp.asarray(into).at[new.place].set(values, mode='drop')

  def into_row(into: jax.Array, one: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(into, jnp.asarray(one, into.dtype), row, axis=0)

  columns, given = state.cache.columns, prefilled.cache.columns
  prompt = Origin(owner=PROMPT, step=-1, rank=0, lag=0, by_rank=False, sees_all=False)  # type: ignore[arg-type]
  cache = KVCache(
    layers=jax.tree.map(into_row, state.cache.layers, prefilled.cache.layers),
    heads=jax.tree.map(into_row, state.cache.heads, prefilled.cache.heads),
    columns=dataclasses.replace(
      columns,
      position=into_row(columns.position, given.position),
      valid=into_row(columns.valid, given.valid),
      origin=jax.tree.map(lambda old, value: old.at[row].set(value), columns.origin, prompt),
    ),
  )
  fields = {
    'row': row,
    'thinker': thinkers,
    'slot': thinkers,
    'rank': thinkers,
    'lag': new.lag,
    'by_rank': new.by_rank,
    'sees_all': False,
    'start': 0,
    'shared': new.shared,
    'fed': new.shared - 1,
    'slot_width': new.slot_width,
  }
  group = dataclasses.replace(group, fed=group.fed * stay)
  return dataclasses.replace(
    state,
    cache=cache,
    tokens=put(state.tokens, new.tokens),
    prompt_length=put(state.prompt_length * stay, new.length),
    step=put(state.step * stay, 0),
    done=put(state.done | ~stay, False),
    stop_reason=put(state.stop_reason, 0),
    requests=jax.tree.map(put, state.requests, new.requests),
    fill=into_row(state.fill, prefilled.fill),
    pending=jax.tree.map(into_row, state.pending, prefilled.pending),
    aux=dataclasses.replace(
      state.aux,
      passes=into_row(state.aux.passes, prefilled.aux.passes),
      extra=jax.tree.map(into_row, state.aux.extra, prefilled.aux.extra),
    ),
    group=dataclasses.replace(
      group, **{name: put(getattr(group, name), value) for name, value in fields.items()}
    ),
  )


def empty_grouping(texts: int, *, max_lanes: int) -> Grouping:
  """Of a state whose texts nobody has taken yet.

  Args:
    texts: how many.
    max_lanes: thinkers of a request at most.
  """
  zeros, no = jnp.zeros((texts,), jnp.int32), jnp.zeros((texts,), bool)
  return Grouping(
    row=zeros,
    thinker=zeros,
    slot=zeros,
    rank=zeros,
    lag=zeros,
    by_rank=no,
    sees_all=no,
    start=zeros,
    shared=zeros,
    fed=zeros,
    slot_width=zeros,
    max_lanes=max_lanes,
  )


@decode_jit(static=(), donated=('state',))
def release_rows(state: DecodeState, rows: jax.Array) -> DecodeState:
  """`state` with the marked rows (of groups: texts; bool) ended where they are; `state` is donated."""
  return dataclasses.replace(state, done=state.done | rows)


@decode_jit(static=('width',), donated=())
def read_gains(state: DecodeState, seen: jax.Array, *, width: int) -> Gains:
  """Each row's generated tokens number `seen` (i32 `[rows]`) to `seen + width - 1`."""
  column = (state.prompt_length + seen)[:, None] + jnp.arange(width)

  def window(array: jax.Array) -> jax.Array:
    at = column.reshape(*column.shape, *(1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, at, axis=1, mode='clip')

  return Gains(
    tokens=window(state.tokens),
    exit_layer=window(state.aux.exit_layer),
    confidence=window(state.aux.confidence),
    log_prob=window(state.aux.log_prob),
    top_ids=window(state.aux.top_ids),
    top_log_probs=window(state.aux.top_log_probs),
    step=state.step,
    done=state.done,
    stop_reason=state.stop_reason,
  )


@decode_jit(static=('chunk',), donated=())
def read_chunk(state: DecodeState, first: jax.Array | int, *, chunk: int) -> CacheChunk:
  """What the first row has cached in columns `first` to `first + chunk - 1`, in every layer."""

  def cut(array: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array[:1], first, chunk, axis=2)

  cache = state.cache
  return CacheChunk(layers=jax.tree.map(cut, cache.layers), heads=jax.tree.map(cut, cache.heads))


@decode_jit(static=(), donated=('state',))
def write_chunk(state: DecodeState, chunk: CacheChunk, first: jax.Array | int) -> DecodeState:
  """A state of one row with a chunk cached at `first`, as if prefilled there; `state` is donated.

  The chunk's tokens, and all before them, must be those of the row.
  """
  width = chunk.layers[0].key.shape[2]

  def put(into: jax.Array, part: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(into, part, first, axis=2)

  cache = state.cache
  column = jnp.arange(cache.columns.valid.shape[1])
  here = (column >= first) & (column < first + width)
  columns = dataclasses.replace(
    cache.columns,
    position=jnp.where(here, column, cache.columns.position),
    valid=cache.columns.valid | here,
  )
  return dataclasses.replace(
    state,
    cache=KVCache(
      layers=jax.tree.map(put, cache.layers, chunk.layers),
      heads=jax.tree.map(put, cache.heads, chunk.heads),
      columns=columns,
    ),
    fill=jnp.full_like(state.fill, first + width),
  )
