"""The one primitive: extend a span of layers by a few tokens per cache row."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from flax import struct

from exitax.decode.cache import KVCache, LayerCache, write_layer
from exitax.decode.lanes import Lanes, Turns, Visibility, mark_columns
from exitax.decode.texts import Packing
from exitax.layers import (
  AttendFn,
  Rotary,
  cached_attention,
  ragged_attention,
  turned_attention,
)
from exitax.models import ExitConfig, ExitLM, Params


@struct.dataclass
class Extension:
  """What a span of layers makes of some lanes.

  Attributes:
    hidden: the residual stream after the span, shaped like what went in.
    cache: the cache with the lanes written to the span's entries.
    head_features: exit layer -> features of the LAYER heads in the span, which run for every token
      that passes; shaped likewise.
  """

  hidden: jax.Array
  cache: KVCache
  head_features: dict[int, jax.Array]


def extend(
  model: ExitLM,
  params: Params,
  cache: KVCache,
  hidden: jax.Array,
  lanes: Lanes,
  *,
  layers: range,
  visibility: Visibility,
  packing: Packing | None = None,
) -> Extension:
  """Runs `layers` on new tokens against the cache, and caches them there.

  Prefill, plain steps, deferred filling and verification are this function with other lanes and
  layers; a span a:c equals a:b followed by b:c. LAYER heads of exits at layers in (a, b] that have
  a cache entry are run and filled as the tokens pass.

  Args:
    model: the model.
    params: parameters after `ExitLM.unstack`.
    cache: keys and values of earlier tokens, filled up to these lanes for all `layers`.
    hidden: the residual stream before the span: `[rows, lanes, embed]`, or, packed, `[texts, embed]`:
      then only attention looks at lanes that hold nothing.
    lanes: where the tokens stand.
    layers: the span.
    visibility: which keys a lane sees, its own column included.
    packing: which text stands in which lane, if `hidden` is flat.
  """
  columns = mark_columns(cache.columns, lanes)
  mask = visibility(lanes, columns)
  turns = _turns(model, visibility.turns(lanes, columns, mask))
  position = lanes.position if packing is None else packing.to_texts(lanes.position)
  rotary = model.rotary(position, below=model.config.max_length)
  filled, heads = list(cache.layers), dict(cache.heads)
  head_features: dict[int, jax.Array] = {}

  for layer in layers:
    attend = cached_attend(filled[layer], lanes, mask, packing, turns)
    hidden, (filled[layer],) = model.run_layers(
      params, hidden, layers=range(layer, layer + 1), rotary=rotary, attend=(attend,)
    )
    depth = layer + 1
    if depth in heads:
      attend = cached_attend(heads[depth], lanes, mask, packing, turns)
      head_features[depth], heads[depth] = model.exit_features(
        params, _exit_at(model, depth), hidden, rotary=rotary, attend=attend
      )
  cache = dataclasses.replace(cache, layers=tuple(filled), heads=heads, columns=columns)
  return Extension(hidden=hidden, cache=cache, head_features=head_features)


def cached_attend(
  entry: LayerCache,
  lanes: Lanes,
  mask: jax.Array,
  packing: Packing | None = None,
  turns: tuple[Rotary, jax.Array] | None = None,
) -> AttendFn:
  """An `AttendFn` that caches the lanes in `entry`, attends over it and returns it.

  Args:
    entry: filled up to these lanes.
    lanes: where the tokens stand.
    mask: bool `[rows, lanes, capacity]`, the columns that each lane sees.
    packing: which text stands in which lane, if queries, keys and values are flat.
    turns: how queries are turned for each block, and each key's block, as in `turned_attention`.
  """

  def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
    if packing is not None:
      query, key, value = map(packing.to_rows, (query, key, value))
    written = write_layer(entry, key, value, lanes)
    seen = (query, written.key, written.value, mask)
    if turns is not None:
      mixed = turned_attention(*seen, *turns)
    elif packing is not None:
      mixed = ragged_attention(*seen, packing.used)
    else:
      mixed = cached_attention(*seen)
    return mixed if packing is None else packing.to_texts(mixed), written

  return attend


def copy_state(
  model: ExitLM,
  params: Params,
  cache: KVCache,
  stream: jax.Array,
  lanes: Lanes,
  *,
  layers: range,
) -> KVCache:
  """Caches lanes in `layers` as if these left their stream unchanged (CALM, arXiv 2207.07061).

  Each layer's keys and values are made of the same `stream` `[rows, lanes, embed]`; whatever else a
  layer computes is used by nobody, and the compiler leaves it out.
  """
  rotary = model.rotary(lanes.position, below=model.config.max_length)
  filled, heads = list(cache.layers), dict(cache.heads)

  def write_to(entry: LayerCache) -> AttendFn:
    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, Any]:
      return query, write_layer(entry, key, value, lanes)

    return attend

  for layer in layers:
    attend = (write_to(filled[layer]),)
    _, (filled[layer],) = model.run_layers(
      params, stream, layers=range(layer, layer + 1), rotary=rotary, attend=attend
    )
    depth = layer + 1
    if depth in heads:
      exit_config = _exit_at(model, depth)
      _, heads[depth] = model.exit_features(
        params, exit_config, stream, rotary=rotary, attend=write_to(heads[depth])
      )
  columns = mark_columns(cache.columns, lanes)
  return dataclasses.replace(cache, layers=tuple(filled), heads=heads, columns=columns)


def _turns(model: ExitLM, turns: Turns | None) -> tuple[Rotary, jax.Array] | None:
  if turns is None:
    return None
  return model.rotary(turns.positions, below=model.config.max_length), turns.block


def _exit_at(model: ExitLM, layer: int) -> ExitConfig:
  return next(item for item in model.config.exits if item.layer == layer)
