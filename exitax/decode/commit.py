"""The end of a step: tokens are appended, recorded, and rows end."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from exitax.decode.plan import Gain, TokenScores
from exitax.decode.state import DecodeState, StopReason


def commit(state: DecodeState, gain: Gain) -> DecodeState:
  """Appends a step's tokens up to each row's first stop token or its budget.

  What the step has cached beyond the new length is given up: fill is cut to the tokens fed before
  the newest, and later columns are no longer valid.
  """
  count, stopped = _cut_at_stop(state, gain)
  count = jnp.minimum(count, state.requests.budget - state.step)
  offset = jnp.arange(state.tokens.shape[1]) - state.length[:, None]
  here = (offset >= 0) & (offset < count[:, None])
  width = gain.tokens.shape[1]

  def put(array: jax.Array, value: jax.Array) -> jax.Array:
    """`value` `[rows, width, ...]` at the new columns of `array` `[rows, capacity, ...]`."""
    lane = jnp.clip(offset, 0, width - 1)
    trailing = (1,) * (value.ndim - 2)
    moved = (
      value
      if width == 1
      else jnp.take_along_axis(value, lane.reshape(*lane.shape, *trailing), axis=1)
    )
    return jnp.where(here.reshape(*here.shape, *trailing), moved, array)

  generated = state.step + count
  spent = (count > 0) & (generated >= state.requests.budget) & ~stopped
  reason = jnp.where(stopped, StopReason.STOP_TOKEN, state.stop_reason)
  scores = gain.scores
  if not isinstance(scores, TokenScores):
    scores = token_scores(scores, gain.tokens, num_top=state.aux.top_ids.shape[2])
  state = dataclasses.replace(
    state,
    tokens=put(state.tokens, gain.tokens),
    step=generated,
    done=state.done | stopped | spent,
    stop_reason=jnp.where(spent, StopReason.BUDGET, reason),
    aux=dataclasses.replace(
      state.aux,
      exit_layer=put(state.aux.exit_layer, gain.exit_layer),
      confidence=put(state.aux.confidence, gain.confidence),
      agreement=put(state.aux.agreement, gain.agreement),
      log_prob=put(state.aux.log_prob, scores.log_prob),
      top_ids=put(state.aux.top_ids, scores.top_ids),
      top_log_probs=put(state.aux.top_log_probs, scores.top_log_probs),
    ),
  )
  return state if width == 1 else _give_up_rejected(state)


def token_scores(scores: jax.Array, tokens: jax.Array, *, num_top: int) -> TokenScores:
  """What is recorded of `scores` `[rows, width, vocab]` that `tokens` `[rows, width]` come from."""
  log_probs = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
  chosen = jnp.take_along_axis(log_probs, tokens[:, :, None], axis=-1)[:, :, 0]
  if not num_top:
    empty = jnp.zeros((*tokens.shape, 0), jnp.float32)
    return TokenScores(chosen, empty.astype(jnp.int32), empty)
  top_log_probs, top_ids = jax.lax.top_k(log_probs, num_top)
  return TokenScores(chosen, top_ids.astype(jnp.int32), top_log_probs)


def _cut_at_stop(state: DecodeState, gain: Gain) -> tuple[jax.Array, jax.Array]:
  """Tokens up to the first stop token, it included, i32 `[rows]`; and whether there is one."""
  lane = jnp.arange(gain.tokens.shape[1])
  stops = jnp.any(gain.tokens[:, :, None] == state.requests.stop_tokens[:, None, :], axis=2)
  # A stop token beyond the budget is not reached.
  stops &= lane < jnp.minimum(gain.count, state.requests.budget - state.step)[:, None]
  stopped = jnp.any(stops, axis=1)
  first = jnp.argmax(stops, axis=1).astype(jnp.int32)
  return jnp.where(stopped, first + 1, gain.count), stopped


def _give_up_rejected(state: DecodeState) -> DecodeState:
  """Cuts fill and valid columns to the tokens fed: all but the newest."""
  fed = (state.length - 1)[:, None]
  columns = state.cache.columns
  valid = columns.valid & (jnp.arange(columns.valid.shape[1]) < fed)
  cache = dataclasses.replace(state.cache, columns=dataclasses.replace(columns, valid=valid))
  return dataclasses.replace(state, cache=cache, fill=jnp.minimum(state.fill, fed))
