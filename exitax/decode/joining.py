"""Thinkers that come, go and are spoken to while their group thinks; the one that sums it up at the end."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from exitax.decode.compiling import decode_jit
from exitax.decode.state import DecodeState, Requests, StopReason
from exitax.decode.texts import Grouping

GIVEN = 0  # Exit layer of tokens that were given to a text, not chosen.


@struct.dataclass
class NewText:
  """A text that begins in a row that is thinking; numbers are scalars, traced.

  Attributes:
    row: its row of the cache.
    header: i32 `[width]`, what it begins with, from index 0.
    header_length: at least 1.
    number: unique in the row.
    slot: its block of positions.
    slot_width: positions of a slot.
    rank: its order within a step.
    lag: it sees tokens of others that are at least so many steps old.
    by_rank: of the same step it sees those of lower rank.
    sees_all: it sees everything.
    requests: settings, of one row.
  """

  row: jax.Array | int
  header: jax.Array | np.ndarray
  header_length: jax.Array | int
  number: jax.Array | int
  slot: jax.Array | int
  slot_width: jax.Array | int
  rank: jax.Array | int
  lag: jax.Array | int
  by_rank: jax.Array | bool
  sees_all: jax.Array | bool
  requests: Requests


@decode_jit(static=(), donated=('state',))
def start_text(state: DecodeState, text: jax.Array | int, new: NewText) -> DecodeState:
  """`state` with `new` in place of text `text`, which must have ended; `state` is donated.

  It sees what its row has thought so far as its visibility says, at its row's present step. A text that
  another one began with (a fork) is a header.
  """
  group = _group(state)
  here = (group.row == new.row) & (state.prompt_length > 0)
  shared = jnp.max(jnp.where(here, group.shared, 0))
  now = jnp.max(jnp.where(here, group.start + group.fed - group.shared, 0))
  # The prompt's tokens are there for whoever reads the text; the model has been fed them.
  prompt = state.tokens[jnp.argmax(jnp.where(here, group.shared, 0))]
  column = jnp.arange(prompt.shape[0])
  header = jnp.take(jnp.asarray(new.header), jnp.clip(column - shared, 0, new.header.shape[0] - 1))
  tokens = jnp.where(column < shared, prompt, header)
  fields = {
    'row': new.row,
    'thinker': new.number,
    'slot': new.slot,
    'rank': new.rank,
    'lag': new.lag,
    'by_rank': new.by_rank,
    'sees_all': new.sees_all,
    'start': now,
    'shared': shared,
    'fed': shared,
    'slot_width': new.slot_width,
  }
  grouped = {name: getattr(group, name).at[text].set(value) for name, value in fields.items()}
  return dataclasses.replace(
    state,
    tokens=state.tokens.at[text].set(tokens),
    prompt_length=state.prompt_length.at[text].set(shared + new.header_length),
    step=state.step.at[text].set(0),
    done=state.done.at[text].set(False),
    stop_reason=state.stop_reason.at[text].set(StopReason.RUNNING),
    requests=jax.tree.map(
      lambda all_of, one: jnp.asarray(all_of).at[text].set(one[0]), state.requests, new.requests
    ),
    group=dataclasses.replace(group, **grouped),
  )


@decode_jit(static=(), donated=('state',))
def stop_texts(state: DecodeState, texts: jax.Array) -> DecodeState:
  """`state` with the marked texts (bool `[texts]`) ended where they are; `state` is donated.

  The others see what they have written, the last token included.
  """
  ends = texts & ~state.done
  return dataclasses.replace(
    state,
    done=state.done | texts,
    stop_reason=jnp.where(ends, StopReason.STOPPED, state.stop_reason),
  )


@decode_jit(static=(), donated=('state',))
def give_tokens(
  state: DecodeState, text: jax.Array | int, tokens: jax.Array, count: jax.Array | int
) -> DecodeState:
  """`state` with the first `count` of `tokens` (i32 `[width]`) appended to a running text; donated.

  They are fed one a step, as headers are, and seen by the others as they are; its budget of own tokens
  stays. Capacity, columns and slot must have room. Does nothing to a text that has ended.
  """
  _group(state)
  count = jnp.where(state.done[text], 0, count)
  column = jnp.arange(state.tokens.shape[1])
  offset = column - (state.prompt_length[text] + state.step[text])
  here = (offset >= 0) & (offset < count)
  given = jnp.take(jnp.asarray(tokens), jnp.clip(offset, 0, tokens.shape[0] - 1))
  layers = jnp.where(here, GIVEN, state.aux.exit_layer[text])
  return dataclasses.replace(
    state,
    tokens=state.tokens.at[text].set(jnp.where(here, given, state.tokens[text])),
    step=state.step.at[text].add(count),
    requests=dataclasses.replace(
      state.requests, budget=jnp.asarray(state.requests.budget).at[text].add(count)
    ),
    aux=dataclasses.replace(state.aux, exit_layer=state.aux.exit_layer.at[text].set(layers)),
  )


def _group(state: DecodeState) -> Grouping:
  assert state.group is not None, 'only texts of groups join others'
  return state.group
