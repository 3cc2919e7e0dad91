"""Segments: spans of layers between exits, run over the tokens that each row has left waiting there."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.cache import KVCache
from exitax.decode.decide import AtExit, Decision
from exitax.decode.extend import copy_state, extend
from exitax.decode.lanes import Visibility, consecutive_lanes, lanes_of_columns
from exitax.decode.state import DecodeState
from exitax.decode.texts import Feed
from exitax.models import ExitLM, Params


class Filling(enum.Enum):
  """What becomes of the keys and values that an exiting token skips."""

  DEFERRED = 'deferred'  # The stream at the exit is kept; deep layers run over it later. Exact.
  RECOMPUTED = 'recomputed'  # Nothing is kept; later tokens run it again from layer 0. Exact.
  COPIED = 'copied'  # Made at once from the stream at the exit, as if it stayed so. Approximate.


class SegmentPlan(Protocol):
  """What running a segment depends on: the static part of a thresholded plan."""

  @property
  def segments(self) -> tuple[range, ...]:
    """Spans of layers between exits."""
    ...

  @property
  def filling(self) -> Filling:
    """What becomes of skipped keys and values."""
    ...

  @property
  def lane_buckets(self) -> tuple[int, ...]:
    """Numbers of lanes that deep segments are compiled for."""
    ...


@struct.dataclass
class Passed:
  """What leaves a segment.

  Attributes:
    cache: the cache, written.
    hidden: `[rows, lanes, embed]` after the segment.
    newest: each text's newest token before and after it.
    count: i32 `[rows]`, lanes that ran.
  """

  cache: KVCache
  hidden: jax.Array
  newest: AtExit
  count: jax.Array


def run_segment(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  index: int,
  needs: jax.Array,
  *,
  feed: Feed,
  plan: SegmentPlan,
  visibility: Visibility,
) -> Passed:
  """Runs a segment over the waiting tokens of the rows that need it, if there are any.

  Other rows come along where their waiting tokens fit: the weights are read anyway.
  """
  layers, active = plan.segments[index], feed.rows
  if index == 0 and feed.packing is not None:
    return _run_packed(model, params, state, feed, plan=plan, visibility=visibility)
  if index == 0:
    waiting = state.length - state.fill[:, 0]
    inputs = _embed_waiting(model, params, state, plan)
  else:
    waiting = state.fill[:, index - 1] - state.fill[:, index]
    inputs = state.pending[index - 1]
  if plan.filling is Filling.COPIED:
    active = needs  # Nothing waits but the newest token; the others' keys are copied.

  def run(num_lanes: int, count: jax.Array, entries: Any, head: Any) -> Any:
    lanes = lanes_of_columns(state.cache.columns, state.fill[:, index], count, num_lanes=num_lanes)
    cache = _with_entries(state.cache, layers, entries, head)
    after = extend(
      model, params, cache, inputs[:, :num_lanes], lanes, layers=layers, visibility=visibility
    )
    features = after.head_features.get(layers.stop, after.hidden)
    newest = jax.tree.map(
      lambda array: feed.newest(array, count),
      AtExit(before=inputs[:, :num_lanes], stream=after.hidden, features=features),
    )
    return *_entries(after.cache, layers), after.hidden, newest

  if index == 0 and inputs.shape[1] == 1:
    count = active.astype(jnp.int32)
    entries, head, hidden, newest = run(1, count, *_entries(state.cache, layers))
  else:
    widths = jnp.asarray(plan.lane_buckets)
    largest = jnp.max(jnp.where(needs, waiting, 0))
    bucket = jnp.sum(widths < largest)
    runs = active & (largest > 0) & (waiting <= widths[bucket])
    count = jnp.where(runs, waiting, 0)

    def run_bucket(num_lanes: int, carry: Any) -> Any:
      entries, head, hidden, _ = carry
      entries, head, ran, newest = run(num_lanes, count, entries, head)
      return entries, head, jax.lax.dynamic_update_slice(hidden, ran, (0, 0, 0)), newest

    nothing = jnp.zeros((*feed.tokens.shape, inputs.shape[-1]), inputs.dtype)
    newest = AtExit(before=nothing, stream=nothing, features=nothing)
    carry = (*_entries(state.cache, layers), jnp.zeros_like(inputs), newest)
    for i, num_lanes in enumerate(plan.lane_buckets):
      carry = run_if(
        (largest > 0) & (bucket == i),
        lambda carry, lanes=num_lanes: run_bucket(lanes, carry),
        carry,
      )
    entries, head, hidden, newest = carry
  return Passed(
    cache=_with_entries(state.cache, layers, entries, head),
    hidden=hidden,
    newest=newest,
    count=count,
  )


def _run_packed(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  feed: Feed,
  *,
  plan: SegmentPlan,
  visibility: Visibility,
) -> Passed:
  """The first segment over the tokens of all texts, flat."""
  assert feed.packing is not None and plan.filling is Filling.DEFERRED
  layers = plan.segments[0]
  hidden = model.embed(params, feed.tokens[None])[0]
  after = extend(
    model,
    params,
    state.cache,
    hidden,
    feed.lanes,
    layers=layers,
    visibility=visibility,
    packing=feed.packing,
  )
  features = after.head_features.get(layers.stop, after.hidden)
  return Passed(
    cache=after.cache,
    hidden=feed.packing.to_rows(after.hidden),
    newest=AtExit(before=hidden, stream=after.hidden, features=features),
    count=feed.count,
  )


def _embed_waiting(
  model: ExitLM, params: Params, state: DecodeState, plan: SegmentPlan
) -> jax.Array:
  """`[rows, lanes, embed]`: the tokens that the first layer has not seen, or is to see again."""
  num_lanes = plan.lane_buckets[-1] if plan.filling is Filling.RECOMPUTED else 1
  columns = state.fill[:, :1] + jnp.arange(num_lanes)
  return model.embed(params, jnp.take_along_axis(state.tokens, columns, axis=1, mode='clip'))


def copy_decided(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  decision: Decision,
  index: int,
  rows: jax.Array,
  *,
  plan: SegmentPlan,
  visibility: Visibility,
) -> DecodeState:
  """Caches the newest token of `rows` (bool `[rows]`) in a segment as its stream at the exit says."""
  del visibility
  layers = plan.segments[index]
  lanes = consecutive_lanes(state.fill[:, index], rows.astype(jnp.int32), num_lanes=1)

  def copy(carry: Any) -> Any:
    cache = _with_entries(state.cache, layers, *carry)
    stream = decision.stream[:, None]
    return _entries(copy_state(model, params, cache, stream, lanes, layers=layers), layers)

  entries, head = run_if(jnp.any(rows), copy, _entries(state.cache, layers))
  return dataclasses.replace(
    state,
    cache=_with_entries(state.cache, layers, entries, head),
    fill=state.fill.at[:, index].add(rows.astype(jnp.int32)),
  )


def advance(state: DecodeState, index: int, passed: Passed) -> DecodeState:
  """Books a segment's lanes as filled, and hands its output to the next segment's waiting room."""
  pending = state.pending
  if index < len(pending):
    waiting = state.fill[:, index] - state.fill[:, index + 1]
    pending = _replace(pending, index, _push(pending[index], waiting, passed.hidden, passed.count))
  passes = state.aux.passes.at[:, index].add((passed.count > 0).astype(jnp.int32))
  return dataclasses.replace(
    state,
    cache=passed.cache,
    fill=state.fill.at[:, index].add(passed.count),
    pending=pending,
    aux=dataclasses.replace(state.aux, passes=passes),
  )


def _push(buffer: jax.Array, filled: jax.Array, new: jax.Array, count: jax.Array) -> jax.Array:
  """Per row, `buffer` with the first `count` of `new` put behind its first `filled` entries."""
  slot = jnp.arange(buffer.shape[1])
  offset = slot - filled[:, None]
  source = jnp.clip(offset, 0, new.shape[1] - 1)
  shifted = jax.vmap(lambda row, index: row[index])(new, source)
  is_new = (offset >= 0) & (offset < count[:, None])
  return jnp.where(is_new[:, :, None], shifted, buffer)


# Helpers.


def _entries(cache: KVCache, layers: range) -> tuple[Any, Any]:
  """The cache entries that a segment writes, and no others."""
  return cache.layers[layers.start : layers.stop], cache.heads.get(layers.stop)


def _with_entries(cache: KVCache, layers: range, entries: Any, head: Any) -> KVCache:
  kept = cache.layers
  heads = cache.heads if head is None else {**cache.heads, layers.stop: head}
  return dataclasses.replace(
    cache, layers=(*kept[: layers.start], *entries, *kept[layers.stop :]), heads=heads
  )


def run_if(wanted: jax.Array, act: Callable[[Any], Any], carry: Any) -> Any:
  """`act(carry)` if wanted, else `carry`, as a loop of one round or none.

  Unlike conditionals, loops update what they carry in place: `lax.cond` and `lax.switch` copy the
  cache entries that pass through them.
  """

  def once(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    return jnp.zeros_like(state[0]), act(state[1])

  return jax.lax.while_loop(lambda state: state[0], once, (wanted, carry))[1]


def _replace(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
  return (*items[:index], item, *items[index + 1 :])
