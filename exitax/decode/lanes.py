"""Lanes: the tokens that a cache row gains in one call, and which keys they see."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

# Owner of the tokens of a prompt, which all texts of a row share.
PROMPT = -1


@struct.dataclass
class Origin:
  """Who fed a token and when, in a row that several texts share; i32 or bool `[rows, n]` each.

  Attributes:
    owner: the thinker, or `PROMPT`.
    step: of the row; -1 in the prompt.
    rank: order within a step.
    lag: of a query: it sees tokens of others that are at least so many steps old.
    by_rank: of a query: of the same step it sees those of lower rank; `lag` is not read then.
    sees_all: of a query: it sees everything, whatever the two say.
  """

  owner: jax.Array
  step: jax.Array
  rank: jax.Array
  lag: jax.Array
  by_rank: jax.Array
  sees_all: jax.Array


@struct.dataclass
class Lanes:
  """New tokens per row, side by side in the cache.

  Lane i of a row is cached in column `first_column + i`. Lanes that are not valid carry padding:
  what they cache is seen by nobody, and a row without a valid lane writes nothing at all.

  Attributes:
    position: i32 `[rows, lanes]`, for the rotary embedding.
    first_column: i32 `[rows]`.
    valid: bool `[rows, lanes]`.
    origin: `[rows, lanes]` in rows that texts share; None elsewhere, and in prompts.
  """

  position: jax.Array
  first_column: jax.Array
  valid: jax.Array
  origin: Origin | None = None


@struct.dataclass
class KeyColumns:
  """What visibility may look at in a key, by cache column.

  Attributes:
    position: i32 `[rows, capacity]`.
    valid: bool `[rows, capacity]`; False for columns unused, stale or rejected.
    origin: `[rows, capacity]` in rows that texts share; None elsewhere.
  """

  position: jax.Array
  valid: jax.Array
  origin: Origin | None = None


@struct.dataclass
class Turns:
  """Where queries stand when each sees the blocks of its row in an order of its own.

  Attributes:
    positions: i32 `[rows, lanes, blocks]`, by how many positions the query is moved on before it meets
      the keys of a block.
    block: i32 `[rows, capacity]`, of each key.
  """

  positions: jax.Array
  block: jax.Array


class Visibility(Protocol):
  """Who sees whom, and from where: pure functions of query lanes and key columns."""

  def __call__(self, lanes: Lanes, keys: KeyColumns) -> jax.Array:
    """Bool `[rows, lanes, capacity]`; True where the lane sees the column."""
    ...

  def turns(self, lanes: Lanes, keys: KeyColumns, mask: jax.Array) -> Turns | None:
    """Where queries stand; None where one position serves for all keys.

    Args:
      lanes: the queries.
      keys: the columns.
      mask: what each query sees.
    """
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

  def turns(self, lanes: Lanes, keys: KeyColumns, mask: jax.Array) -> None:
    """One position serves for all keys."""


@dataclasses.dataclass(frozen=True)
class InGroups:
  """Sees the prompt, its own text, and of the others what each query's `Origin` says (Group Think).

  A query of thinker n at step t sees a token of another thinker of step s if s <= t - lag, or, by rank, if
  s < t or s = t and its rank is lower. A lag of 0 is the paper's conditioning on everyone's first
  t tokens; 1 sees only finished steps; one larger than any text sees no others: independent texts
  on a shared prompt. `by_rank` is the ordinary causal mask over tokens cached in turns.

  Attributes:
    sliding_window: number of latest positions seen; None sees all.
    rotated: for `Positions.ROTATED`, one more than the highest number of a thinker; 0 otherwise.
  """

  sliding_window: int | None = None
  rotated: int = 0

  def __call__(self, lanes: Lanes, keys: KeyColumns) -> jax.Array:
    assert lanes.origin is not None and keys.origin is not None, 'rows without groups are Causal'
    query = jax.tree.map(lambda array: array[:, :, None], lanes.origin)
    key = jax.tree.map(lambda array: array[:, None, :], keys.origin)
    by_rank = (key.step < query.step) | ((key.step == query.step) & (key.rank < query.rank))
    others = jnp.where(query.by_rank, by_rank, key.step <= query.step - query.lag)
    own = (key.owner == query.owner) & (key.step <= query.step)
    other = (key.owner != query.owner) & (others | query.sees_all)
    mask = keys.valid[:, None, :] & ((key.owner == PROMPT) | own | other)
    if self.sliding_window is not None:
      distance = lanes.position[:, :, None] - keys.position[:, None, :]
      mask &= distance < self.sliding_window
    return mask

  def turns(self, lanes: Lanes, keys: KeyColumns, mask: jax.Array) -> Turns | None:
    """Each thinker reads the prompt, the others' texts by number, and its own last (Hogwild! inference).

    Keys of texts were turned by their places in their own text (arXiv 2504.06261, section 3.4). Prompt p0
    p1, texts of 2 and 3 tokens: the second thinker's newest token stands at 2 + 2 + 2 = 6 as the
    prompt sees it, the other's tokens are 2 and 3, its own 4, 5 and 6.
    """
    if not self.rotated:
      return None
    assert lanes.origin is not None and keys.origin is not None
    number = jnp.arange(self.rotated)
    of_block = keys.origin.owner[:, None, :, None] == number
    seen = jnp.sum(mask[..., None] & of_block, axis=2)
    own = lanes.origin.owner[..., None] == number
    others = jnp.where(own, 0, seen)
    total = jnp.sum(others, axis=-1, keepdims=True)
    before = jnp.cumsum(others, axis=-1) - others
    of_prompt = keys.origin.owner[:, None, :] == PROMPT
    prompt = jnp.sum(mask & of_prompt, axis=2)[..., None]
    moves = jnp.concatenate([jnp.where(own, 0, total - before), prompt + total], axis=-1)
    # The prompt's last token, which all texts feed together, stands where it is.
    moves = jnp.where(lanes.origin.owner[..., None] == PROMPT, 0, moves)
    owner = keys.origin.owner
    return Turns(positions=moves, block=jnp.where(owner == PROMPT, self.rotated, owner))


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
  origin = keys.origin
  if origin is not None and lanes.origin is not None:
    origin = jax.tree.map(
      lambda new, old: jnp.where(written, jnp.take_along_axis(new, lane, axis=1), old),
      lanes.origin,
      origin,
    )
  return KeyColumns(
    position=jnp.where(written, position, keys.position),
    valid=jnp.where(written, valid, keys.valid),
    origin=origin,
  )


def lanes_of_columns(
  keys: KeyColumns, first: jax.Array, count: jax.Array, *, num_lanes: int
) -> Lanes:
  """Lanes of the tokens that columns `first, first + 1, ...` hold, of which `count` are valid.

  Args:
    keys: the columns.
    first: i32 `[rows]`.
    count: i32 `[rows]`, at most `num_lanes`.
    num_lanes: lanes per row.
  """
  if keys.origin is None:  # The column is the position.
    return consecutive_lanes(first, count, num_lanes=num_lanes)
  column = first[:, None] + jnp.arange(num_lanes)

  def at(array: jax.Array) -> jax.Array:
    return jnp.take_along_axis(array, column, axis=1, mode='clip')

  return Lanes(
    position=at(keys.position),
    first_column=first,
    valid=at(keys.valid) & (jnp.arange(num_lanes) < count[:, None]),
    origin=jax.tree.map(at, keys.origin),
  )
