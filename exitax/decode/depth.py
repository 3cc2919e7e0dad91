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
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.cache import KVCache
from exitax.decode.confidence import Confidence, ExitView
from exitax.decode.extend import copy_state, extend
from exitax.decode.lanes import Visibility, consecutive_lanes, mark_columns
from exitax.decode.plan import Agreement, Gain, Record
from exitax.decode.sampler import choose_tokens
from exitax.decode.scores import head_logits, scores_dtype
from exitax.decode.state import DecodeState
from exitax.layers import HeadKind
from exitax.models import ExitConfig, ExitLM, Params


class Filling(enum.Enum):
  """What becomes of the keys and values that an exiting token skips."""

  DEFERRED = 'deferred'  # The stream at the exit is kept; deep layers run over it later. Exact.
  RECOMPUTED = 'recomputed'  # Nothing is kept; later tokens run it again from layer 0. Exact.
  COPIED = 'copied'  # Made at once from the stream at the exit, as if it stayed so. Approximate.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitPlan:
  """A `StepPlan` of one token per step, which leaves at an exit. Thresholds are data.

  Attributes:
    exits: the exits in use, by ascending layer.
    num_layers: layers of the model.
    confidence: what is compared with the thresholds.
    patience: exits in a row that must agree, for `Confidence.PATIENCE`.
    decay: how fast thresholds fall with the tokens generated; 0 keeps them (see `thresholds_at`).
    filling: what becomes of skipped keys and values.
    pending_capacity: tokens of a row that deep layers may lag behind before they must catch up.
    lane_buckets: numbers of lanes that deep layers are compiled for; the last is the capacity.
    record: what is recorded.
    num_top: alternatives whose log-probabilities are recorded per token.
  """

  exits: tuple[ExitConfig, ...]
  num_layers: int
  confidence: Confidence
  patience: int = 2
  decay: float = 0.0
  filling: Filling = Filling.DEFERRED
  pending_capacity: int = 1
  lane_buckets: tuple[int, ...] = (1,)
  record: Record = Record.DECISION
  num_top: int = 0

  @property
  def segments(self) -> tuple[range, ...]:
    """Spans of layers between exits: `[0:l1], [l1:l2], ..., [ln:L]`."""
    return cut_at_exits(self.exits, self.num_layers)

  @property
  def head_layers(self) -> tuple[int, ...]:
    """Layers of the exits that need cache entries of their own."""
    return layers_with_cache(self.exits)

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
    """Feeds each active row's newest token and chooses the next one."""
    active = ~state.done
    state, decision = pass_depths(model, params, state, plan=self, visibility=visibility)
    gain = Gain(
      tokens=choose_tokens(decision.logits, state.requests, state.step)[:, None],
      count=active.astype(jnp.int32),
      scores=decision.logits[:, None],
      exit_layer=decision.exit_layer[:, None],
      confidence=decision.confidence[:, None],
      agreement=decision.agreement[:, None],
    )
    return state, gain


def cut_at_exits(exits: tuple[ExitConfig, ...], num_layers: int) -> tuple[range, ...]:
  """Spans of layers between exits: `[0:l1], [l1:l2], ..., [ln:L]`."""
  cuts = (0, *(item.layer for item in exits), num_layers)
  return tuple(range(a, b) for a, b in itertools.pairwise(cuts))


def layers_with_cache(exits: tuple[ExitConfig, ...]) -> tuple[int, ...]:
  """Layers of the exits whose heads cache keys of their own."""
  return tuple(item.layer for item in exits if item.head is HeadKind.LAYER)


@struct.dataclass
class Decision:
  """Where each row stopped, and on which scores.

  Attributes:
    undecided: bool `[rows]`, active rows that no exit has stopped yet.
    logits: `[rows, vocab]` of the exit that decided.
    exit_layer: i32 `[rows]`, layers run before it.
    confidence: f32 `[rows]`.
    agreement: i32 `[rows]`, of `Agreement`.
    stream: `[rows, embed]`, the stream at the exit that decided; for `Filling.COPIED` alone.
    best: i32 `[rows]`, the token that the last exit ranked first; for `Confidence.PATIENCE` alone.
    agreeing: i32 `[rows]`, how many exits in a row have ranked it first.
  """

  undecided: jax.Array
  logits: jax.Array
  exit_layer: jax.Array
  confidence: jax.Array
  agreement: jax.Array
  stream: jax.Array
  best: jax.Array
  agreeing: jax.Array


@struct.dataclass
class _Passed:
  """What leaves a segment.

  Attributes:
    cache: the cache, written.
    hidden: `[rows, lanes, embed]` after the segment.
    before: `[rows, embed]`, each row's newest lane before the segment.
    stream: `[rows, embed]`, the same after it.
    at_exit: `[rows, embed]`, what the exit's head reads of it: the stream, or, if the segment ends
      at a LAYER head, its features.
    count: i32 `[rows]`, lanes that ran.
  """

  cache: KVCache
  hidden: jax.Array
  before: jax.Array
  stream: jax.Array
  at_exit: jax.Array
  count: jax.Array


def pass_depths(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  *,
  plan: ExitPlan,
  visibility: Visibility,
) -> tuple[DecodeState, Decision]:
  """Takes each active row's newest token as deep as its confidence asks for.

  Args:
    model: the model.
    params: parameters after `ExitLM.unstack`.
    state: before the step.
    plan: exits and capacities.
    visibility: which keys a token sees.

  Returns:
    The state with cache, fill, pending and passes moved on, and the decisions.
  """
  active = ~state.done
  if plan.filling is Filling.RECOMPUTED:
    # What was not filled to the last layer is run again from the first.
    state = dataclasses.replace(state, fill=jnp.broadcast_to(state.fill[:, -1:], state.fill.shape))
  state = _mark_newest(state, active)
  decision = _no_decision(model, active)
  last = len(plan.segments) - 1
  for index in range(last + 1):
    if index == 0:
      needs = active
    else:
      needs = decision.undecided | (active & _must_fill(state, plan))
      if plan.filling is Filling.COPIED:
        needs = decision.undecided
        state = _copy_decided(
          model, params, state, decision, index, active & ~needs, plan=plan, visibility=visibility
        )
    passed = _run_segment(
      model, params, state, index, needs, active=active, plan=plan, visibility=visibility
    )
    state = _advance(state, index, passed)
    if index < last:
      decision = _decide_at_exit(model, params, state, decision, passed, index, plan=plan)
    else:
      decision = _decide_at_end(model, params, decision, passed, active, plan=plan)
  return state, decision


# Segments.


def _mark_newest(state: DecodeState, active: jax.Array) -> DecodeState:
  """Makes the newest token's column valid; segments hand on the entries that they write alone."""
  newest = consecutive_lanes(state.length - 1, active.astype(jnp.int32), num_lanes=1)
  columns = mark_columns(state.cache.columns, newest)
  return dataclasses.replace(state, cache=dataclasses.replace(state.cache, columns=columns))


def _run_segment(
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
  """Runs a segment over the waiting tokens of the rows that need it, if there are any.

  Other rows come along where their waiting tokens fit: the weights are read anyway.
  """
  layers = plan.segments[index]
  if index == 0:
    waiting = state.length - state.fill[:, 0]
    inputs = _embed_waiting(model, params, state, plan)
  else:
    waiting = state.fill[:, index - 1] - state.fill[:, index]
    inputs = state.pending[index - 1]
  if plan.filling is Filling.COPIED:
    active = needs  # Nothing waits but the newest token; the others' keys are copied.

  def run(num_lanes: int, count: jax.Array, entries: Any, head: Any) -> Any:
    lanes = consecutive_lanes(state.fill[:, index], count, num_lanes=num_lanes)
    cache = _with_entries(state.cache, layers, entries, head)
    after = extend(
      model, params, cache, inputs[:, :num_lanes], lanes, layers=layers, visibility=visibility
    )
    features = after.head_features.get(layers.stop, after.hidden)
    newest = jnp.maximum(count - 1, 0)[:, None, None]
    ends = [
      jnp.take_along_axis(array, newest, axis=1)[:, 0]
      for array in (inputs[:, :num_lanes], after.hidden, features)
    ]
    return *_entries(after.cache, layers), after.hidden, *ends

  if index == 0 and inputs.shape[1] == 1:
    count = active.astype(jnp.int32)
    entries, head, hidden, *ends = run(1, count, *_entries(state.cache, layers))
  else:
    widths = jnp.asarray(plan.lane_buckets)
    largest = jnp.max(jnp.where(needs, waiting, 0))
    bucket = jnp.sum(widths < largest)
    runs = active & (largest > 0) & (waiting <= widths[bucket])
    count = jnp.where(runs, waiting, 0)

    def run_bucket(num_lanes: int, carry: Any) -> Any:
      entries, head, hidden, *_ = carry
      entries, head, ran, *ends = run(num_lanes, count, entries, head)
      return entries, head, jax.lax.dynamic_update_slice(hidden, ran, (0, 0, 0)), *ends

    nothing = jnp.zeros_like(inputs[:, 0])
    carry = (*_entries(state.cache, layers), jnp.zeros_like(inputs), nothing, nothing, nothing)
    for i, num_lanes in enumerate(plan.lane_buckets):
      carry = run_if(
        (largest > 0) & (bucket == i),
        lambda carry, lanes=num_lanes: run_bucket(lanes, carry),
        carry,
      )
    entries, head, hidden, *ends = carry
  before, stream, at_exit = ends
  return _Passed(
    cache=_with_entries(state.cache, layers, entries, head),
    hidden=hidden,
    before=before,
    stream=stream,
    at_exit=at_exit,
    count=count,
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
  shape, config = active.shape, model.config
  return Decision(
    undecided=active,
    logits=jnp.zeros((*shape, config.vocab_size), scores_dtype(model)),
    exit_layer=jnp.zeros(shape, jnp.int32),
    confidence=jnp.zeros(shape, jnp.float32),
    agreement=jnp.full(shape, Agreement.UNKNOWN, jnp.int32),
    stream=jnp.zeros((*shape, config.embed_dim), config.precision.dtype),
    best=jnp.full(shape, -1, jnp.int32),
    agreeing=jnp.zeros(shape, jnp.int32),
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
  """Stops the rows that are confident enough.

  Scores cost a vocabulary matrix: they are made if a row might need them to decide, or, where the
  confidence does not read scores, if some row stops.
  """
  thresholds = thresholds_at(state, index, plan.decay)
  undecided = decision.undecided
  if plan.confidence.reads_scores:
    # Thresholds of 1 are never met: rows that ask for full depth pay for no other scores.
    could_stop = undecided & (thresholds < 1.0) if plan.confidence.reads_one_exit else undecided
    logits = _logits_if(model, params, jnp.any(could_stop), passed, index, plan=plan)
    decision = _count_agreeing(decision, logits, plan=plan)
    confidence = _confidence(params, decision, passed, logits, index, plan=plan)
    stops = undecided & (confidence > thresholds)
  else:
    confidence = _confidence(params, decision, passed, None, index, plan=plan)
    stops = undecided & (confidence > thresholds)
    logits = _logits_if(model, params, jnp.any(stops), passed, index, plan=plan)
  return _take(decision, stops, logits, confidence, passed.stream, plan.exits[index].layer)


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
  decision = _count_agreeing(decision, logits, plan=plan)
  confidence = _confidence(params, decision, passed, logits, len(plan.exits), plan=plan)
  ends_here = decision.undecided
  decision = _take(decision, ends_here, logits, confidence, passed.stream, plan.num_layers)
  agreement = jnp.where(ends_here, Agreement.SAME, decision.agreement)
  if compares:
    same = jnp.argmax(decision.logits, axis=-1) == jnp.argmax(logits, axis=-1)
    agreement = jnp.where(same, Agreement.SAME, Agreement.DIFFERENT)
  return dataclasses.replace(decision, agreement=agreement)


def thresholds_at(state: DecodeState, index: int, decay: float) -> jax.Array:
  """Thresholds of exit `index` for the next token, f32 `[rows]`.

  CALM's decay (arXiv 2207.07061, section 3.5): 0.9 T + 0.1 T exp(-decay t / N) at token t of a
  budget of N, so that early tokens, on which all others build, are judged more strictly. A threshold
  of 1 stays 1: it never exits.
  """
  thresholds = jnp.asarray(state.requests.thresholds)[:, index]
  if not decay:
    return thresholds
  fraction = state.step / jnp.asarray(state.requests.budget)
  decayed = thresholds * (0.9 + 0.1 * jnp.exp(-decay * fraction))
  return jnp.where(thresholds < 1.0, decayed, thresholds)


def _confidence(
  params: Params,
  decision: Decision,
  passed: _Passed,
  logits: jax.Array | None,
  index: int,
  *,
  plan: ExitPlan,
) -> jax.Array:
  """f32 `[rows]`. A learned classifier judges exits only: the final layer's is 1."""
  measure, final = plan.confidence, index == len(plan.exits)
  if measure is Confidence.CLASSIFIER and final:
    return jnp.ones(decision.undecided.shape, jnp.float32)
  classifier = None
  if measure is Confidence.CLASSIFIER:
    classifier = params['confidence'][str(plan.exits[index].layer)]
  view = ExitView(
    scores=logits,
    before=passed.before,
    stream=passed.stream,
    agreeing=decision.agreeing,
    patience=plan.patience,
    classifier=classifier,
  )
  return measure.of_exit(view).astype(jnp.float32)


def _count_agreeing(decision: Decision, logits: jax.Array, *, plan: ExitPlan) -> Decision:
  """Exits in a row, this one included, that rank the same token first."""
  if plan.confidence is not Confidence.PATIENCE:
    return decision
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  agreeing = jnp.where(best == decision.best, decision.agreeing + 1, 1)
  return dataclasses.replace(decision, best=best, agreeing=agreeing)


def _take(
  decision: Decision,
  stops: jax.Array,
  logits: jax.Array,
  confidence: jax.Array,
  stream: jax.Array,
  layer: int,
) -> Decision:
  return dataclasses.replace(
    decision,
    undecided=decision.undecided & ~stops,
    logits=jnp.where(stops[:, None], logits, decision.logits),
    exit_layer=jnp.where(stops, layer, decision.exit_layer),
    confidence=jnp.where(stops, confidence, decision.confidence),
    stream=jnp.where(stops[:, None], stream, decision.stream),
  )


def _logits_if(
  model: ExitLM,
  params: Params,
  wanted: Any,
  passed: _Passed,
  index: int,
  *,
  plan: ExitPlan,
) -> jax.Array:
  """Scores `[rows, vocab]` of the exit after segment `index`; zeros, unread, if nobody wants them."""
  exit_config = plan.exits[index] if index < len(plan.exits) else None

  def score() -> jax.Array:
    return head_logits(model, params, exit_config, passed.at_exit)

  # The only head is always wanted.
  if wanted is True or not plan.exits:
    return score()
  shape = (passed.at_exit.shape[0], model.config.vocab_size)
  nothing = jnp.zeros(shape, scores_dtype(model))
  return jnp.asarray(jax.lax.cond(wanted, score, lambda: nothing))


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
