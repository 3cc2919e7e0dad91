"""Pipelined early exit (EE-LLM, arXiv 2312.04916, section 4.2): one tick of all stages per step.

At a tick each stage runs its layers over the one token per row that it holds. The exits on a stage
judge rows that are still undecided. A token that is chosen on stage k is announced to all stages, and
stage 0 starts the row's next token at the next tick, while the stream of the token before goes on
through the deeper stages, only to fill their caches. So a token takes as many ticks as its exit's
stage is deep, and every cache is complete when it is read: a token is at least one stage behind the
one before it.

Worked miniature, 3 stages, one row; token 5 exits on stage 0, token 6 on stage 1:

  tick  stage 0    stage 1    stage 2    fill after   length after
  1     5: exits   -          -          [6, 5, 5]    7
  2     6          5: fills   -          [7, 6, 5]    7
  3     -          6: exits   5: fills   [7, 7, 6]    8
  4     7          -          6: fills   [8, 7, 7]    8

What a stage holds follows from `fill`: stage s holds token fill[s] if stage s - 1 has run it (stage 0:
if the text has it), and the token is undecided if it is the newest of the text.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.commit import token_scores
from exitax.decode.decide import (
  AtExit,
  Decision,
  decide_at_end,
  decide_at_exit,
  no_decision,
  thresholds_at,
)
from exitax.decode.depth import ExitPlan, mark_newest
from exitax.decode.lanes import KeyColumns, Visibility, consecutive_lanes
from exitax.decode.plan import Agreement, Gain, Placement, TokenScores
from exitax.decode.sampler import choose_tokens
from exitax.decode.stage_pass import Stage, StagePass
from exitax.decode.stage_placement import (
  StagedPlacement,
  own_params,
  params_specs,
  rows_specs,
  staged_specs,
)
from exitax.decode.state import DecodeState, Requests
from exitax.models import ExitLM, Params
from exitax.parallel import PIPELINE_AXIS, announce

TICKS = 'ticks'  # In `ExitRecord.extra`: i32 `[rows]`, ticks that the row took since prefill.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelinePlan(ExitPlan):
  """A `StepPlan` whose step is a tick.

  Attributes:
    stages: where layers, exits and caches lie.
  """

  stages: StagedPlacement

  @property
  def placement(self) -> Placement:
    """By stage."""
    return self.stages

  @property
  def segments(self) -> tuple[range, ...]:
    """Layers of each stage."""
    return self.stages.segments

  def init_extra(self, rows: int) -> dict[str, Any]:
    """Ticks, and what exits on earlier stages have ranked first."""
    return {
      TICKS: jnp.zeros((rows,), jnp.int32),
      'best': jnp.full((rows,), -1, jnp.int32),
      'agreeing': jnp.zeros((rows,), jnp.int32),
    }

  def advance(
    self, model: ExitLM, params: Params, state: DecodeState, *, visibility: Visibility
  ) -> tuple[DecodeState, Gain]:
    """One tick: every stage runs what it holds of active rows; others keep what they hold."""
    active = ~state.done
    sent = jnp.concatenate([state.length[:, None], state.fill[:, :-1]], axis=1)
    runs = active[:, None] & (sent > state.fill)
    newest = consecutive_lanes(state.length - 1, runs[:, 0].astype(jnp.int32), num_lanes=1)
    state = mark_newest(state, newest)
    rows = _rows(state, runs, self)
    layers, heads, pending, word = self._tick(model, params, state, rows, visibility)
    final = word.exit_layer == self.num_layers
    gain = Gain(
      tokens=word.token[:, None],
      count=word.stops,
      scores=word.scores,
      exit_layer=word.exit_layer[:, None],
      confidence=word.confidence[:, None],
      agreement=jnp.where(final, Agreement.SAME, Agreement.UNKNOWN)[:, None],
    )
    ran, extra = runs.astype(jnp.int32), state.aux.extra
    extra = {
      TICKS: extra[TICKS] + active,
      'best': jnp.where(active, word.best, extra['best']),
      'agreeing': jnp.where(active, word.agreeing, extra['agreeing']),
    }
    state = dataclasses.replace(
      state,
      cache=dataclasses.replace(state.cache, layers=layers, heads=heads),
      fill=state.fill + ran,
      pending=pending,
      aux=dataclasses.replace(state.aux, passes=state.aux.passes + ran, extra=extra),
    )
    return state, gain

  def _tick(
    self,
    model: ExitLM,
    params: Params,
    state: DecodeState,
    rows: _Rows,
    visibility: Visibility,
  ) -> Any:
    """Cache entries, pending streams and the announcements after a tick."""

    def on_stage(params: Params, layers: Any, heads: Any, pending: Any, rows: _Rows) -> Any:
      number = jax.lax.axis_index(PIPELINE_AXIS)
      stage = Stage(model, self.stages, own_params(params), number, visibility)
      embedded = model.embed(params, rows.newest[:, None])
      held = [jnp.where(number == 0, embedded, x) for x in pending]
      runs = rows.runs[:, number]
      lanes = consecutive_lanes(rows.fill[:, number], runs.astype(jnp.int32), num_lanes=1)
      after = stage.run(held[0], lanes, layers=layers, heads=heads, columns=rows.columns)
      undecided = runs & rows.newest_held[:, number]
      before = held[-1][:, 0]
      word = self._judge(model, params, after, before, undecided, rows, number)
      word = announce(word, undecided, axis=PIPELINE_AXIS)
      handed = [after.hidden, self._last_tap(after, held[-1], number)][: len(pending)]
      arrives = rows.runs[:, number - 1][:, None, None]
      pending = tuple(
        jnp.where(arrives, stage.hand_on(new), old)
        for new, old in zip(handed, pending, strict=True)
      )
      return after.layers, after.heads, pending, word

    staged = (state.cache.layers, state.cache.heads, state.pending)
    word = jax.eval_shape(lambda: _no_word(rows.fill.shape[0], self.num_top))
    return jax.shard_map(
      on_stage,
      in_specs=(params_specs(params), *staged_specs(staged), rows_specs(rows)),
      out_specs=(*staged_specs(staged), rows_specs(word)),
      check_vma=False,
    )(params, *staged, rows)

  def _judge(
    self,
    model: ExitLM,
    params: Params,
    after: StagePass,
    before: jax.Array,
    undecided: jax.Array,
    rows: _Rows,
    number: jax.Array,
  ) -> _Word:
    """What the exits of this device's stage say; branches hold no collective."""
    taps = [tap[:, 0] for tap in after.taps]
    features = [x[:, 0] for x in after.features]

    def judge_on(stage: int) -> Decision:
      decision = undecided_yet
      heads = self.stages.heads_of[stage]
      for tap, index in enumerate(self.stages.exits_of[stage]):
        at = AtExit(
          before=taps[tap - 1] if tap else before,
          stream=taps[tap],
          features=features[heads.index(index)] if index in heads else taps[tap],
        )
        if index < len(self.exits):
          decision = decide_at_exit(
            model, params, decision, at, index, thresholds=rows.thresholds[:, index], rule=self
          )
        else:
          decision = decide_at_end(model, params, decision, at, rule=self)
      return decision

    def judge() -> Decision:
      branches = [lambda stage=stage: judge_on(stage) for stage in range(self.stages.num_stages)]
      return jax.lax.switch(number, branches)

    undecided_yet = dataclasses.replace(
      no_decision(model, undecided), best=rows.best, agreeing=rows.agreeing
    )
    decision = jax.lax.cond(jnp.any(undecided), judge, lambda: undecided_yet)
    return self._choose(decision, undecided & ~decision.undecided, rows)

  def _choose(self, decision: Decision, stops: jax.Array, rows: _Rows) -> _Word:
    """The tokens of the rows that stop here (bool `[rows]`), in words."""
    nothing = _no_word(stops.shape[0], self.num_top)

    def choose() -> _Word:
      token = choose_tokens(decision.logits, rows.requests, rows.step)
      return dataclasses.replace(
        nothing,
        token=token,
        scores=token_scores(decision.logits[:, None], token[:, None], num_top=self.num_top),
      )

    return dataclasses.replace(
      jax.lax.cond(jnp.any(stops), choose, lambda: nothing),
      stops=stops.astype(jnp.int32),
      exit_layer=decision.exit_layer,
      confidence=decision.confidence,
      best=decision.best,
      agreeing=decision.agreeing,
    )

  def _last_tap(self, after: StagePass, before: jax.Array, number: jax.Array) -> jax.Array:
    """The stream at the last exit so far, for the measure of the next stage's first."""
    places = jnp.asarray(self.stages.exit_places)[number]
    for i, tap in enumerate(after.taps):
      before = jnp.where(places[i] >= 0, tap, before)
    return before


@struct.dataclass
class _Rows:
  """What stages read of the rows, every array rows first.

  Attributes:
    newest: i32 `[rows]`, the last token of the text.
    fill: i32 `[rows, stages]`: the position of what each stage holds.
    runs: bool `[rows, stages]`, whether it holds something and the row is active.
    newest_held: bool `[rows, stages]`, whether it is the newest token, still undecided.
    thresholds: f32 `[rows, num_exits]`.
    requests: how tokens are chosen.
    step: i32 `[rows]`, tokens generated.
    best: i32 `[rows]`, what the last exit of the undecided token ranked first.
    agreeing: i32 `[rows]`, how many exits in a row did.
    columns: what visibility looks at.
  """

  newest: jax.Array
  fill: jax.Array
  runs: jax.Array
  newest_held: jax.Array
  thresholds: jax.Array
  requests: Requests
  step: jax.Array
  best: jax.Array
  agreeing: jax.Array
  columns: KeyColumns


@struct.dataclass
class _Word:
  """What a stage announces of the undecided token of each row.

  Attributes:
    stops: i32 `[rows]`, 1 where an exit has chosen the next token.
    token: i32 `[rows]`, that token.
    exit_layer: i32 `[rows]`.
    confidence: f32 `[rows]`.
    scores: of the token, width 1.
    best: as in `_Rows`; so is `agreeing`.
  """

  stops: jax.Array
  token: jax.Array
  exit_layer: jax.Array
  confidence: jax.Array
  scores: TokenScores
  best: jax.Array
  agreeing: jax.Array


def _rows(state: DecodeState, runs: jax.Array, plan: PipelinePlan) -> _Rows:
  newest = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1, mode='clip')
  thresholds = [thresholds_at(state, i, plan.decay) for i in range(len(plan.exits))]
  starts = runs[:, 0]
  return _Rows(
    newest=newest[:, 0],
    fill=state.fill,
    runs=runs,
    newest_held=state.fill == state.length[:, None] - 1,
    thresholds=jnp.stack([*thresholds, jnp.ones_like(state.step, jnp.float32)], axis=1),
    requests=state.requests,
    step=state.step,
    best=jnp.where(starts, -1, state.aux.extra['best']),
    agreeing=jnp.where(starts, 0, state.aux.extra['agreeing']),
    columns=state.cache.columns,
  )


def _no_word(rows: int, num_top: int) -> _Word:
  integers, floats = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,), jnp.float32)
  return _Word(
    stops=integers,
    token=integers,
    exit_layer=integers,
    confidence=floats,
    scores=TokenScores(
      log_prob=floats[:, None],
      top_ids=jnp.zeros((rows, 1, num_top), jnp.int32),
      top_log_probs=jnp.zeros((rows, 1, num_top), jnp.float32),
    ),
    best=integers,
    agreeing=integers,
  )
