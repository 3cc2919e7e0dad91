"""The key/value cache: one entry per layer and per exit head with a layer of its own."""

from __future__ import annotations

import dataclasses
import enum

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.lanes import PROMPT, KeyColumns, Lanes, Origin
from exitax.layers import Int8, quantise
from exitax.models import ModelConfig
from exitax.parallel import constrain


class CacheFormat(enum.Enum):
  """How keys and values are kept."""

  COMPUTE = 'compute'  # In the format of the computation.
  INT8 = 'int8'  # 8 bits, and a scale per token and head. Approximate.


@struct.dataclass
class LayerCache:
  """Keys and values of one attention layer, heads before columns (see `cached_attention`).

  Attributes:
    key: `[rows, num_kv_heads, capacity, head_dim]`, stored after the rotary embedding.
    value: likewise.
  """

  key: jax.Array | Int8
  value: jax.Array | Int8


@struct.dataclass
class KVCache:
  """What attention has seen so far.

  Entries that were never written, or whose column is no longer valid, hold anything: they are
  masked, never zeroed. Layers may be filled to different lengths; a column's `valid` says that the
  token exists, and whoever runs a layer fills every earlier token of the row there first.

  Attributes:
    layers: one entry per layer. A tuple, since slices of a stacked array are copied.
    heads: exit layer -> entry of its `HeadKind.LAYER` head, for the exits in use.
    columns: what visibility looks at, shared by all entries.
  """

  layers: tuple[LayerCache, ...]
  heads: dict[int, LayerCache]
  columns: KeyColumns


def init_cache(
  config: ModelConfig, *, rows: int, capacity: int, head_layers: tuple[int, ...] = ()
) -> KVCache:
  """An empty cache.

  Args:
    config: the model.
    rows: requests (or groups, or slots).
    capacity: columns per row.
    head_layers: layers of the exits whose heads cache keys of their own.
  """
  shape = (rows, config.num_kv_heads, capacity, config.head_dim)

  def entry() -> LayerCache:
    return LayerCache(
      key=_place(jnp.zeros(shape, config.precision.dtype)),
      value=_place(jnp.zeros(shape, config.precision.dtype)),
    )

  return KVCache(
    layers=tuple(entry() for _ in range(config.num_layers)),
    heads={layer: entry() for layer in head_layers},
    columns=init_columns(rows, capacity),
  )


def init_columns(rows: int, capacity: int) -> KeyColumns:
  """Columns before the first token."""
  return KeyColumns(
    position=jnp.zeros((rows, capacity), jnp.int32), valid=jnp.zeros((rows, capacity), bool)
  )


def with_origins(cache: KVCache) -> KVCache:
  """The empty cache of rows that several texts share: its columns know who fed them."""
  shape = cache.columns.valid.shape
  zeros, no = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)
  origin = Origin(
    owner=zeros + PROMPT, step=zeros - 1, rank=zeros, lag=zeros, by_rank=no, sees_all=no
  )
  return dataclasses.replace(cache, columns=dataclasses.replace(cache.columns, origin=origin))


def write_layer(entry: LayerCache, key: jax.Array, value: jax.Array, lanes: Lanes) -> LayerCache:
  """Writes lanes' keys and values `[rows, lanes, num_kv_heads, head_dim]` into their columns.

  The whole window of lanes is written, padding included, except for rows without a valid lane and
  for windows that reach beyond the capacity: those write nothing.
  """
  capacity = entry.key.shape[2]
  start = jnp.where(jnp.any(lanes.valid, axis=1), lanes.first_column, capacity)
  return LayerCache(
    key=_write(entry.key, key.swapaxes(1, 2), start),
    value=_write(entry.value, value.swapaxes(1, 2), start),
  )


def empty_in_format(cache: KVCache, cache_format: CacheFormat) -> KVCache:
  """The same empty cache in a format; inside `jax.jit`, what it replaces is never allocated."""
  if cache_format is CacheFormat.COMPUTE:
    return cache

  def small(array: jax.Array) -> Int8:
    scale = jnp.zeros((*array.shape[:-1], 1), jnp.float32)
    return Int8(values=jnp.zeros(array.shape, jnp.int8), scale=scale)

  layers, heads = jax.tree.map(small, (cache.layers, cache.heads))
  return dataclasses.replace(cache, layers=layers, heads=heads)


def truncate(cache: KVCache, lengths: jax.Array) -> KVCache:
  """The cache with only the first `lengths` (i32 `[rows]`) columns of each row valid."""
  columns = cache.columns
  kept = jnp.arange(columns.valid.shape[1]) < lengths[:, None]
  return dataclasses.replace(
    cache, columns=dataclasses.replace(columns, valid=columns.valid & kept)
  )


def _write(stored: jax.Array | Int8, update: jax.Array, start: jax.Array) -> jax.Array | Int8:
  if not isinstance(stored, Int8):
    return _place(_write_windows(stored, update, start))
  small = quantise(update, (-1,))
  return Int8(
    values=_place(_write_windows(stored.values, small.values, start)),
    scale=_place(_write_windows(stored.scale, small.scale, start)),
  )


def _write_windows(array: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
  """Per row, `array[row, :, start : start + lanes] = update[row]`; dropped if it does not fit.

  One window per row and head: with a single window XLA on the CPU makes of the scatter an update
  that it fuses into both the loop's carry and the attention, and copies the cache in between.
  """
  numbers = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(0, 1), inserted_window_dims=(), scatter_dims_to_operand_dims=(0,)
  )

  def write_head(array: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.scatter(
      array,
      start[None],
      update,
      numbers,
      unique_indices=True,
      mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )

  starts = jnp.broadcast_to(start[:, None], array.shape[:2])
  return jax.vmap(jax.vmap(write_head))(array, update.astype(array.dtype), starts)


def _place(array: jax.Array) -> jax.Array:
  return constrain(array, ('batch', 'kv_heads', None, None))
