"""Texts and the cache rows that they lie in: one each, or, for groups of thinkers, several in a row.

Without groups every text has a row of the cache to itself. In a group (Group Think, arXiv 2505.11107) a row
holds one prompt and the tokens of several texts, each written by a *thinker*; who sees whom is
written beside the keys (`lanes.Origin`). A step feeds at most one token per text; layers see these
tokens flat, and only attention looks at them row by row, so that a group of eight and seven single
requests cost fifteen tokens.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.lanes import Lanes, consecutive_lanes
from exitax.layers import PROMPT, Origin

if TYPE_CHECKING:
  from exitax.decode.state import DecodeState


class Positions(enum.Enum):
  """Which rotary positions the tokens of a thinker have."""

  SLOTS = 'slots'  # A block of positions of its own: prompt + slot * slot_width + t (the paper's).
  SHARED = 'shared'  # prompt + t, the same for all.
  # As if each thinker read the prompt, the others' texts and its own text, in this order (Hogwild!
  # inference): keys stand at t, and queries are moved for each text that they meet.
  ROTATED = 'rotated'


@struct.dataclass
class Grouping:
  """Where each text is cached, and how it stands to the others of its row. Data, never array indices.

  Attributes:
    row: i32 `[texts]`, its row of the cache.
    thinker: i32 `[texts]`, unique in the row: owner of its keys, part of its random numbers.
    slot: i32 `[texts]`, its block of positions.
    rank: i32 `[texts]`, order within a step, for texts that see `by_rank`.
    lag: i32 `[texts]`: sees tokens of others that are at least so many steps old.
    by_rank: bool `[texts]`: sees of the same step only those of lower rank; `lag` is not read.
    sees_all: bool `[texts]`: sees everything, whatever `lag` and `by_rank` say.
    start: i32 `[texts]`, step of the row at which it began.
    shared: i32 `[texts]`, tokens of the row's prompt.
    fed: i32 `[texts]`, tokens of the text (the prompt's included) that the model has been fed.
    slot_width: i32 `[texts]`, positions of a slot.
    positions: the scheme.
    max_lanes: texts of a row at most.
  """

  row: jax.Array
  thinker: jax.Array
  slot: jax.Array
  rank: jax.Array
  lag: jax.Array
  by_rank: jax.Array
  sees_all: jax.Array
  start: jax.Array
  shared: jax.Array
  fed: jax.Array
  slot_width: jax.Array
  positions: Positions = struct.field(pytree_node=False, default=Positions.SLOTS)
  max_lanes: int = struct.field(pytree_node=False, default=1)


@struct.dataclass
class Packing:
  """Which text stands in which lane of its row.

  Attributes:
    row: i32 `[texts]`; that of texts without a lane is out of bounds.
    lane: i32 `[texts]`.
    text: i32 `[rows, lanes]`; anything in lanes without a text.
    used: i32 `[rows]`, lanes with a text: the first ones.
  """

  row: jax.Array
  lane: jax.Array
  text: jax.Array
  used: jax.Array

  def to_rows(self, values: jax.Array) -> jax.Array:
    """`[texts, ...]` to `[rows, lanes, ...]`; anything in lanes without a text."""
    return values[self.text]

  def to_texts(self, values: jax.Array) -> jax.Array:
    """`[rows, lanes, ...]` to `[texts, ...]`; anything for texts without a lane."""
    return values.at[self.row, self.lane].get(mode='clip')


@struct.dataclass
class Feed:
  """The tokens that a step feeds.

  Attributes:
    tokens: i32 `[texts]`.
    active: bool `[texts]`, those that feed one.
    gains: bool `[texts]`, those whose next token is to be chosen: all tokens before it are fed.
    rows: bool `[rows]`, those with a text that feeds.
    count: i32 `[rows]`, columns that they gain.
    lanes: where the tokens stand, `[rows, lanes]`.
    column: i32 `[texts]`, which of the row's new columns is the text's.
    packing: texts and lanes; None where each text is its row's only lane.
  """

  tokens: jax.Array
  active: jax.Array
  gains: jax.Array
  rows: jax.Array
  count: jax.Array
  lanes: Lanes
  column: jax.Array
  packing: Packing | None

  def any_in_row(self, texts: jax.Array) -> jax.Array:
    """Rows with a text that is marked; bool `[texts]` to `[rows]`."""
    if self.packing is None:
      return texts
    marked = jnp.zeros(self.rows.shape, bool)
    return marked.at[self.packing.row].max(texts, mode='drop')

  def newest(self, values: jax.Array, count: jax.Array) -> jax.Array:
    """Each text's entry among the last ones of its row.

    Args:
      values: `[rows, lanes, ...]`, of which `count` are meant, the row's new columns last.
      count: i32 `[rows]`.
    """
    if self.packing is None:
      last = jnp.maximum(count - 1, 0)[:, None]
      index = last.reshape(*last.shape, *(1,) * (values.ndim - 2))
      return jnp.take_along_axis(values, index, axis=1)[:, 0]
    first = (count - self.count).at[self.packing.row].get(mode='clip')
    lane = jnp.clip(first + self.column, 0, values.shape[1] - 1)
    return values.at[self.packing.row, lane].get(mode='clip')


def next_feed(state: DecodeState) -> Feed:
  """What the next step feeds: each running text's newest token, or the next that is given to it."""
  if state.group is None:
    active = ~state.done
    count = active.astype(jnp.int32)
    lanes = consecutive_lanes(state.length - 1, count, num_lanes=1)
    tokens = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1, mode='clip')
    return Feed(
      tokens=tokens[:, 0],
      active=active,
      gains=active,
      rows=active,
      count=count,
      lanes=lanes,
      column=jnp.zeros_like(count),
      packing=None,
    )
  return _feed_of_groups(state, state.group)


def _feed_of_groups(state: DecodeState, group: Grouping) -> Feed:
  num_rows, num_lanes = state.fill.shape[0], group.max_lanes
  # A text that has ended feeds what it has left: others see that it ended.
  runs = ~state.done | (state.stop_reason > 0)
  active = (group.fed < state.length) & runs
  text = jnp.arange(active.shape[0])
  earlier = (text[None, :] < text[:, None]) & active[None, :]
  lane = jnp.sum((group.row[None, :] == group.row[:, None]) & earlier, axis=1)
  row = jnp.where(active, group.row, num_rows)
  packing = Packing(
    row=row,
    lane=lane,
    text=jnp.zeros((num_rows, num_lanes), jnp.int32).at[row, lane].set(text, mode='drop'),
    used=jnp.zeros((num_rows,), jnp.int32).at[row].add(1, mode='drop'),
  )
  # The prompt's last token is fed with the first step: by all texts of the row, cached once.
  age = group.fed - group.shared
  of_prompt = age < 0
  kept = active & (~of_prompt | (lane == 0))
  count = jnp.zeros((num_rows,), jnp.int32).at[row].add(kept, mode='drop')
  step = group.start + age
  if group.positions is Positions.SLOTS:
    position = group.shared + group.slot * group.slot_width + age
  elif group.positions is Positions.SHARED:
    position = group.shared + step
  else:
    position = age
  position = jnp.where(of_prompt, group.fed, position)
  by_text = Origin(
    owner=jnp.where(of_prompt, PROMPT, group.thinker),
    step=jnp.where(of_prompt, -1, step),
    rank=group.rank,
    lag=group.lag,
    by_rank=group.by_rank,
    sees_all=group.sees_all,
  )
  filled = jnp.zeros((num_rows, num_lanes), bool).at[row, lane].set(kept, mode='drop')
  tokens = jnp.take_along_axis(state.tokens, group.fed[:, None], axis=1, mode='clip')[:, 0]
  return Feed(
    tokens=tokens,
    active=active,
    gains=active & (group.fed + 1 == state.length) & ~state.done,
    rows=count > 0,
    count=count,
    lanes=Lanes(
      position=packing.to_rows(position),
      first_column=state.fill[:, 0],
      valid=filled,
      origin=jax.tree.map(packing.to_rows, by_text),
    ),
    column=jnp.where(of_prompt, 0, lane),
    packing=packing,
  )


def prompts(state: DecodeState) -> tuple[jax.Array, jax.Array]:
  """Each row's prompt: i32 `[rows, capacity]` and its length, i32 `[rows]` (0 in unused rows)."""
  group = state.group
  if group is None:
    return state.tokens, state.prompt_length
  of_row = group.row[None, :] == jnp.arange(state.fill.shape[0])[:, None]
  length = jnp.where(of_row & (state.prompt_length > 0), group.shared, 0)
  return state.tokens[jnp.argmax(length, axis=1)], jnp.max(length, axis=1)
