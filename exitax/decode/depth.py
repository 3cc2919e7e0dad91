"""One token's way through the layers: segments, exits, and the tokens that deep layers still owe.

Layers are cut at the exits into segments. Each row decides at each exit whether to stop; a segment
runs only if some row needs it, and then over all tokens that the row has left waiting before it.

Worked miniature, exits after layers 2 and 4 of 6, one row, pending_capacity 4:

  token  confident at   runs (layers: tokens)                  fill after    waiting before 2:4, 4:6
  5      2              0:2: 5                                 [6, 5, 5]     [5], []
  6      4              0:2: 6   2:4: 5, 6                     [7, 7, 5]     [], [5, 6]
  7      nowhere        0:2: 7   2:4: 7   4:6: 5, 6, 7         [8, 8, 8]     [], []
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.cache import KVCache
from exitax.decode.extend import extend
from exitax.decode.lanes import Visibility, consecutive_lanes
from exitax.decode.policies import ExitPlan, Record
from exitax.decode.scores import exit_logits
from exitax.decode.state import Agreement, DecodeState
from exitax.layers import HeadKind
from exitax.models import ExitLM, Params


@struct.dataclass
class Decision:
  """Where each row stopped, and on which scores.

  Attributes:
    undecided: bool `[rows]`, active rows that no exit has stopped yet.
    logits: `[rows, vocab]` of the exit that decided.
    exit_layer: i32 `[rows]`, layers run before it.
    confidence: f32 `[rows]`.
    agreement: i32 `[rows]`, of `Agreement`.
  """

  undecided: jax.Array
  logits: jax.Array
  exit_layer: jax.Array
  confidence: jax.Array
  agreement: jax.Array


@struct.dataclass
class _Passed:
  """What leaves a segment.

  Attributes:
    cache: the cache, written.
    hidden: `[rows, lanes, embed]` after the segment.
    at_exit: `[rows, embed]`, for each row's last lane: the hidden state, or, if the segment ends
      at a LAYER head, its features.
    count: i32 `[rows]`, lanes that ran.
  """

  cache: KVCache
  hidden: jax.Array
  at_exit: jax.Array
  count: jax.Array


def pass_depths(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  hidden: jax.Array,
  *,
  plan: ExitPlan,
  visibility: Visibility,
) -> tuple[DecodeState, Decision]:
  """Takes each active row's newest token as deep as its confidence asks for.

  Args:
    model: the model.
    params: parameters after `ExitLM.unstack`.
    state: before the step.
    hidden: `[rows, 1, embed]`, the embedded newest tokens.
    plan: exits and capacities.
    visibility: which keys a token sees.

  Returns:
    The state with cache, fill, pending and passes moved on, and the decisions.
  """
  active = ~state.done
  decision = _no_decision(model, active)
  last = len(plan.segments) - 1
  for index in range(last + 1):
    if index == 0:
      passed = _run_first(model, params, state, hidden, plan=plan, visibility=visibility)
    else:
      needs = decision.undecided | (active & _must_fill(state, plan))
      passed = _run_deep(
        model, params, state, index, needs, active=active, plan=plan, visibility=visibility
      )
    state = _advance(state, index, passed)
    if index < last:
      decision = _decide_at_exit(model, params, state, decision, passed, index, plan=plan)
    else:
      decision = _decide_at_end(model, params, decision, passed, active, plan=plan)
  return state, decision


# Segments.


def _run_first(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  hidden: jax.Array,
  *,
  plan: ExitPlan,
  visibility: Visibility,
) -> _Passed:
  count = (~state.done).astype(jnp.int32)
  lanes = consecutive_lanes(state.fill[:, 0], count, num_lanes=1)
  layers = plan.segments[0]
  after = extend(model, params, state.cache, hidden, lanes, layers=layers, visibility=visibility)
  features = after.head_features.get(layers.stop, after.hidden)
  return _Passed(cache=after.cache, hidden=after.hidden, at_exit=features[:, 0], count=count)


def _run_deep(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  index: int,
  needs: jax.Array,
  *,
  active: jax.Array,
  plan: ExitPlan,
  visibility: Visibility,
) -> _Passed:
  """Runs a later segment over the waiting tokens of the rows that need it, if there are any.

  Other rows come along where their waiting tokens fit: the weights are read anyway.
  """
  layers, pending = plan.segments[index], state.pending[index - 1]
  waiting = state.fill[:, index - 1] - state.fill[:, index]
  widths = jnp.asarray(plan.lane_buckets)
  largest = jnp.max(jnp.where(needs, waiting, 0))
  bucket = jnp.sum(widths < largest)
  runs = active & (largest > 0) & (waiting <= widths[bucket])
  count = jnp.where(runs, waiting, 0)

  def run(num_lanes: int, carry: Any) -> Any:
    entries, head, hidden, _ = carry
    lanes = consecutive_lanes(state.fill[:, index], count, num_lanes=num_lanes)
    cache = _with_entries(state.cache, layers, entries, head)
    after = extend(
      model, params, cache, pending[:, :num_lanes], lanes, layers=layers, visibility=visibility
    )
    features = after.head_features.get(layers.stop, after.hidden)
    newest = jnp.maximum(count - 1, 0)
    at_exit = jnp.take_along_axis(features, newest[:, None, None], axis=1)[:, 0]
    hidden = jax.lax.dynamic_update_slice(hidden, after.hidden, (0, 0, 0))
    return *_entries(after.cache, layers), hidden, at_exit

  carry = (*_entries(state.cache, layers), jnp.zeros_like(pending), jnp.zeros_like(pending[:, 0]))
  for i, num_lanes in enumerate(plan.lane_buckets):
    carry = _run_if(
      (largest > 0) & (bucket == i), lambda carry, lanes=num_lanes: run(lanes, carry), carry
    )
  entries, head, hidden, at_exit = carry
  cache = _with_entries(state.cache, layers, entries, head)
  return _Passed(cache=cache, hidden=hidden, at_exit=at_exit, count=count)


def _must_fill(state: DecodeState, plan: ExitPlan) -> jax.Array:
  """Rows whose deep layers may not lag behind any further, bool `[rows]`."""
  if plan.record is Record.AGREEMENT:
    return jnp.ones_like(state.done)
  return state.fill[:, 0] - state.fill[:, -1] >= plan.pending_capacity


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


# Decisions.


def _no_decision(model: ExitLM, active: jax.Array) -> Decision:
  shape = active.shape
  return Decision(
    undecided=active,
    logits=jnp.zeros((*shape, model.config.vocab_size), _logits_dtype(model)),
    exit_layer=jnp.zeros(shape, jnp.int32),
    confidence=jnp.zeros(shape, jnp.float32),
    agreement=jnp.full(shape, Agreement.UNKNOWN, jnp.int32),
  )


def _decide_at_exit(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  decision: Decision,
  passed: _Passed,
  index: int,
  *,
  plan: ExitPlan,
) -> Decision:
  logits = _logits_if(model, params, jnp.any(decision.undecided), passed, index, plan=plan)
  confidence = plan.confidence(logits).astype(jnp.float32)
  stops = decision.undecided & (confidence > state.requests.thresholds[:, index])
  decision = _take(decision, stops, logits, confidence, plan.exits[index].layer)
  return decision


def _decide_at_end(
  model: ExitLM,
  params: Params,
  decision: Decision,
  passed: _Passed,
  active: jax.Array,
  *,
  plan: ExitPlan,
) -> Decision:
  compares = plan.record is Record.AGREEMENT
  wanted = active if compares else decision.undecided
  logits = _logits_if(model, params, jnp.any(wanted), passed, len(plan.exits), plan=plan)
  confidence = plan.confidence(logits).astype(jnp.float32)
  ends_here = decision.undecided
  decision = _take(decision, ends_here, logits, confidence, plan.num_layers)
  agreement = jnp.where(ends_here, Agreement.SAME, decision.agreement)
  if compares:
    same = jnp.argmax(decision.logits, axis=-1) == jnp.argmax(logits, axis=-1)
    agreement = jnp.where(same, Agreement.SAME, Agreement.DIFFERENT)
  return dataclasses.replace(decision, agreement=agreement)


def _take(
  decision: Decision, stops: jax.Array, logits: jax.Array, confidence: jax.Array, layer: int
) -> Decision:
  return dataclasses.replace(
    decision,
    undecided=decision.undecided & ~stops,
    logits=jnp.where(stops[:, None], logits, decision.logits),
    exit_layer=jnp.where(stops, layer, decision.exit_layer),
    confidence=jnp.where(stops, confidence, decision.confidence),
  )


def _logits_if(
  model: ExitLM,
  params: Params,
  wanted: jax.Array,
  passed: _Passed,
  index: int,
  *,
  plan: ExitPlan,
) -> jax.Array:
  """Scores `[rows, vocab]` of the exit after segment `index`; zeros, unread, if nobody wants them."""
  exit_config = plan.exits[index] if index < len(plan.exits) else None
  at_exit = passed.at_exit

  def score() -> jax.Array:
    features = at_exit
    if exit_config is None or exit_config.head is not HeadKind.LAYER:
      features, _ = model.exit_features(params, exit_config, at_exit, rotary=None, attend=None)
    return exit_logits(model, params, exit_config, features)

  if index == 0:
    return score()
  shape = (at_exit.shape[0], model.config.vocab_size)
  return jax.lax.cond(wanted, score, lambda: jnp.zeros(shape, _logits_dtype(model)))


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


def _run_if(wanted: jax.Array, act: Callable[[Any], Any], carry: Any) -> Any:
  """`act(carry)` if wanted, else `carry`, as a loop of one round or none.

  Unlike conditionals, loops update what they carry in place: `lax.cond` and `lax.switch` copy the
  cache entries that pass through them.
  """

  def once(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    return jnp.zeros_like(state[0]), act(state[1])

  return jax.lax.while_loop(lambda state: state[0], once, (wanted, carry))[1]


def _replace(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
  return (*items[:index], item, *items[index + 1 :])


def _logits_dtype(model: ExitLM) -> Any:
  return jnp.promote_types(model.config.precision.dtype, jnp.float32)
