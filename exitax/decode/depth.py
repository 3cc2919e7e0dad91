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
from typing import Any

import jax
import jax.numpy as jnp

from exitax.decode.confidence import Confidence
from exitax.decode.decide import (
  Decision,
  decide_at_end,
  decide_at_exit,
  no_decision,
  thresholds_at,
)
from exitax.decode.lanes import Lanes, Visibility, mark_columns
from exitax.decode.placement import LocalPlan
from exitax.decode.plan import Gain, Record
from exitax.decode.sampler import choose_tokens
from exitax.decode.segments import Filling, advance, copy_decided, run_segment
from exitax.decode.state import DecodeState
from exitax.decode.texts import Feed, next_feed
from exitax.models import ExitLM, Params


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
        state = copy_decided(
          model, params, state, decision, index, active & ~needs, plan=plan, visibility=visibility
        )
    passed = run_segment(
      model, params, state, index, needs, feed=feed, plan=plan, visibility=visibility
    )
    state = advance(state, index, passed)
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


def mark_newest(state: DecodeState, newest: Lanes) -> DecodeState:
  """Makes the columns of a step's tokens valid.

  Whoever runs layers then hands on the cache entries that they write, and no columns.
  """
  columns = mark_columns(state.cache.columns, newest)
  return dataclasses.replace(state, cache=dataclasses.replace(state.cache, columns=columns))


def _must_fill(state: DecodeState, feed: Feed, plan: ExitPlan) -> jax.Array:
  """Rows whose deep layers may not lag behind any further, bool `[rows]`."""
  if plan.record is Record.AGREEMENT:
    return jnp.ones_like(feed.rows)
  # The next step's tokens must find room.
  room = plan.pending_capacity + 1 - feed.lanes.position.shape[1]
  return state.fill[:, 0] - state.fill[:, -1] >= room
