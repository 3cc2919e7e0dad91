"""One token's way through the layers: segments, exits, and the tokens that deep layers still owe.

Layers are cut at the exits into segments. Each row decides at each exit whether to stop; a segment
runs only if some row needs it, and then over all tokens that the row has left waiting before it.

Worked miniature, exits after layers 2 and 4 of 6, one row, pending_capacity 4, `Filling.DEFERRED`:

  token  confident at   runs (layers: tokens)                  fill after    waiting before 2:4, 4:6
  5      2              0:2: 5                                 [6, 5, 5]     [5], []
  6      4              0:2: 6   2:4: 5, 6                     [7, 7, 5]     [], [5, 6]
  7      nowhere        0:2: 7   2:4: 7   4:6: 5, 6, 7         [8, 8, 8]     [], []

With `Filling.RECOMPUTED` token 6 runs 0:2 over 5 and 6, and token 7 over 5, 6 and 7; with
`Filling.COPIED` nothing ever waits: token 5's keys of layers 2:6 are made from its stream at layer 2.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.cache import KVCache
from exitax.decode.confidence import Confidence
from exitax.decode.decide import (
  AtExit,
  Decision,
  decide_at_end,
  decide_at_exit,
  no_decision,
  thresholds_at,
)
from exitax.decode.extend import copy_state, extend
from exitax.decode.lanes import (
  Lanes,
  Visibility,
  consecutive_lanes,
  lanes_of_columns,
  mark_columns,
)
from exitax.decode.placement import LocalPlan
from exitax.decode.plan import Gain, Record
from exitax.decode.sampler import choose_tokens
from exitax.decode.state import DecodeState
from exitax.decode.texts import Feed, next_feed
from exitax.models import ExitLM, Params


class Filling(enum.Enum):
  """What becomes of the keys and values that an exiting token skips."""

  DEFERRED = 'deferred'  # The stream at the exit is kept; deep layers run over it later. Exact.
  RECOMPUTED = 'recomputed'  # Nothing is kept; later tokens run it again from layer 0. Exact.
  COPIED = 'copied'  # Made at once from the stream at the exit, as if it stayed so. Approximate.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitPlan(LocalPlan):
  """A `StepPlan` of one token per step, which leaves at an exit. Thresholds are data.

  Attributes:
    confidence: what is compared with the thresholds.
    patience: exits in a row that must agree, for `Confidence.PATIENCE`.
    decay: how fast thresholds fall with the tokens generated; 0 keeps them (see `thresholds_at`).
    filling: what becomes of skipped keys and values.
    pending_capacity: tokens of a row that deep layers may lag behind before they must catch up.
    lane_buckets: numbers of lanes that deep layers are compiled for; the last is the capacity.
    record: what is recorded.
    num_top: alternatives whose log-probabilities are recorded per token.
  """

  confidence: Confidence
  patience: int = 2
  decay: float = 0.0
  filling: Filling = Filling.DEFERRED
  pending_capacity: int = 1
  lane_buckets: tuple[int, ...] = (1,)
  record: Record = Record.DECISION
  num_top: int = 0

  @property
  def overhang(self) -> int:
    """A deep window starts at the last token but one at the latest: the last is never fed."""
    return max(self.pending_capacity - 2, 0)

  def init_extra(self, rows: int) -> dict[str, Any]:
    """Nothing of its own."""
    del rows
    return {}

  def advance(
    self, model: ExitLM, params: Params, state: DecodeState, *, visibility: Visibility
  ) -> tuple[DecodeState, Gain]:
    """Feeds each active text's newest token and chooses the next one."""
    feed = next_feed(state)
    state, decision = pass_depths(model, params, state, feed, plan=self, visibility=visibility)
    thinker = None if state.group is None else state.group.thinker
    gain = Gain(
      tokens=choose_tokens(decision.logits, state.requests, state.step, thinker)[:, None],
      count=feed.gains.astype(jnp.int32),
      scores=decision.logits[:, None],
      exit_layer=decision.exit_layer[:, None],
      confidence=decision.confidence[:, None],
      agreement=decision.agreement[:, None],
    )
    return state, gain


@struct.dataclass
class _Passed:
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


def pass_depths(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  feed: Feed,
  *,
  plan: ExitPlan,
  visibility: Visibility,
) -> tuple[DecodeState, Decision]:
  """Takes each active text's newest token as deep as its confidence asks for.

  Args:
    model: the model.
    params: parameters after `ExitLM.unstack`.
    state: before the step.
    feed: the tokens of the step.
    plan: exits and capacities.
    visibility: which keys a token sees.

  Returns:
    The state with cache, fill, pending and passes moved on, and the decisions.
  """
  active = feed.rows
  if plan.filling is Filling.RECOMPUTED:
    # What was not filled to the last layer is run again from the first.
    state = dataclasses.replace(state, fill=jnp.broadcast_to(state.fill[:, -1:], state.fill.shape))
  state = mark_newest(state, feed.lanes)
  decision = no_decision(model, feed.active)
  last = len(plan.segments) - 1
  for index in range(last + 1):
    if index == 0:
      needs = active
    else:
      needs = feed.any_in_row(decision.undecided) | (active & _must_fill(state, feed, plan))
      if plan.filling is Filling.COPIED:
        needs = decision.undecided
        state = _copy_decided(
          model, params, state, decision, index, active & ~needs, plan=plan, visibility=visibility
        )
    passed = _run_segment(
      model, params, state, index, needs, feed=feed, plan=plan, visibility=visibility
    )
    state = _advance(state, index, passed)
    if index < last:
      thresholds = thresholds_at(state, index, plan.decay)
      decision = decide_at_exit(
        model, params, decision, passed.newest, index, thresholds=thresholds, rule=plan
      )
    else:
      compared = feed.active if plan.record is Record.AGREEMENT else None
      decision = decide_at_end(model, params, decision, passed.newest, rule=plan, compared=compared)
  if state.group is not None:
    group = dataclasses.replace(state.group, fed=state.group.fed + feed.active)
    state = dataclasses.replace(state, group=group)
  return state, decision


# Segments.


def mark_newest(state: DecodeState, newest: Lanes) -> DecodeState:
  """Makes the columns of a step's tokens valid.

  Whoever runs layers then hands on the cache entries that they write, and no columns.
  """
  columns = mark_columns(state.cache.columns, newest)
  return dataclasses.replace(state, cache=dataclasses.replace(state.cache, columns=columns))


def _run_segment(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  index: int,
  needs: jax.Array,
  *,
  feed: Feed,
  plan: ExitPlan,
  visibility: Visibility,
) -> _Passed:
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
  return _Passed(
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
  plan: ExitPlan,
  visibility: Visibility,
) -> _Passed:
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
  return _Passed(
    cache=after.cache,
    hidden=feed.packing.to_rows(after.hidden),
    newest=AtExit(before=hidden, stream=after.hidden, features=features),
    count=feed.count,
  )


def _embed_waiting(model: ExitLM, params: Params, state: DecodeState, plan: ExitPlan) -> jax.Array:
  """`[rows, lanes, embed]`: the tokens that the first layer has not seen, or is to see again."""
  num_lanes = plan.lane_buckets[-1] if plan.filling is Filling.RECOMPUTED else 1
  columns = state.fill[:, :1] + jnp.arange(num_lanes)
  return model.embed(params, jnp.take_along_axis(state.tokens, columns, axis=1, mode='clip'))


def _copy_decided(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  decision: Decision,
  index: int,
  rows: jax.Array,
  *,
  plan: ExitPlan,
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


def _must_fill(state: DecodeState, feed: Feed, plan: ExitPlan) -> jax.Array:
  """Rows whose deep layers may not lag behind any further, bool `[rows]`."""
  if plan.record is Record.AGREEMENT:
    return jnp.ones_like(feed.rows)
  # The next step's tokens must find room.
  room = plan.pending_capacity + 1 - feed.lanes.position.shape[1]
  return state.fill[:, 0] - state.fill[:, -1] >= room


def _advance(state: DecodeState, index: int, passed: _Passed) -> DecodeState:
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
