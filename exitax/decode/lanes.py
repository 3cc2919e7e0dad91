"""Lanes: the tokens that a cache row gains in one call, and which keys they see."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Lanes:
  """New tokens per row, side by side in the cache.

  Lane i of a row is cached in column `first_column + i`. Lanes that are not valid carry padding:
  what they cache is seen by nobody, and a row without a valid lane writes nothing at all.

  Attributes:
    position: i32 `[rows, lanes]`, for the rotary embedding.
    first_column: i32 `[rows]`.
    valid: bool `[rows, lanes]`.
  """

  position: jax.Array
  first_column: jax.Array
  valid: jax.Array


@struct.dataclass
class KeyColumns:
  """What visibility may look at in a key, by cache column.

  Attributes:
    position: i32 `[rows, capacity]`.
    valid: bool `[rows, capacity]`; False for columns unused, stale or rejected.
  """

  position: jax.Array
  valid: jax.Array


class Visibility(Protocol):
  """Who sees whom: a pure function of query lanes and key columns."""

  def __call__(self, lanes: Lanes, keys: KeyColumns) -> jax.Array:
    """Bool `[rows, lanes, capacity]`; True where the lane sees the column."""
    ...


@dataclasses.dataclass(frozen=True)
class Causal:
  """Sees valid keys at its own or an earlier position, within a sliding window if there is one.

  Attributes:
    sliding_window: number of latest positions seen, the query's own included; None sees all.
  """

  sliding_window: int | None = None

  def __call__(self, lanes: Lanes, keys: KeyColumns) -> jax.Array:
    distance = lanes.position[:, :, None] - keys.position[:, None, :]
    mask = keys.valid[:, None, :] & (distance >= 0)
    if self.sliding_window is not None:
      mask &= distance < self.sliding_window
    return mask


def consecutive_lanes(first: jax.Array, count: jax.Array, *, num_lanes: int) -> Lanes:
  """Lanes at positions (and columns) `first, first + 1, ...`, of which `count` are valid.

  Args:
    first: i32 `[rows]`.
    count: i32 `[rows]`, at most `num_lanes`.
    num_lanes: lanes per row.
  """
  offset = jnp.arange(num_lanes)
  return Lanes(
    position=first[:, None] + offset,
    first_column=first,
    valid=offset < count[:, None],
  )


def mark_columns(keys: KeyColumns, lanes: Lanes) -> KeyColumns:
  """The columns after the lanes were cached."""
  num_lanes = lanes.position.shape[1]
  offset = jnp.arange(keys.position.shape[1]) - lanes.first_column[:, None]
  written = (offset >= 0) & (offset < num_lanes) & jnp.any(lanes.valid, axis=1, keepdims=True)
  lane = jnp.clip(offset, 0, num_lanes - 1)
  position = jnp.take_along_axis(lanes.position, lane, axis=1)
  valid = jnp.take_along_axis(lanes.valid, lane, axis=1)
  return KeyColumns(
    position=jnp.where(written, position, keys.position),
    valid=jnp.where(written, valid, keys.valid),
  )
