"""Self-speculation (LayerSkip, arXiv 2404.16710): the model drafts with its first layers.

A round drafts d tokens with the layers up to an exit, then runs the layers behind it once over all of
them. The draft's caches and streams are the model's own, so nothing is computed twice: verification
starts where drafting stopped. A plain step is a round that drafts nothing at the last segment.

Worked miniature, exits after layers 2 and 4 of 6; the newest token is at position 7, and two tokens are
drafted at the exit after layer 2:

  pass   layers   lanes (positions)   chooses
  1      0:2      7                   x8 from the exit's scores
  2      0:2      8                   x9 from the exit's scores
  3      0:2      9                   nothing: only its stream is needed
  4      2:6      7, 8, 9             y8, y9, y10 from the final scores
  x8 = y8 and x9 != y9: the row gains y8, y9; fill is cut to 9, and position 9 is stale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.acceptance import Acceptance, Verdict, choose_lanes, judge
from exitax.decode.cache import KVCache
from exitax.decode.commit import token_scores
from exitax.decode.confidence import Confidence
from exitax.decode.draft_choice import DraftCosts, DraftStats, choose_draft, no_stats, remember
from exitax.decode.extend import extend
from exitax.decode.lanes import Visibility, consecutive_lanes
from exitax.decode.placement import LocalPlan
from exitax.decode.plan import Agreement, Gain, TokenScores
from exitax.decode.sampler import choose_tokens
from exitax.decode.scores import head_logits, scores_dtype
from exitax.decode.segments import run_if
from exitax.decode.state import DecodeState
from exitax.layers import HeadKind
from exitax.models import ExitLM, Params

# Where a plan keeps things in `ExitRecord.extra`.
STATS = 'draft'  # `DraftStats`.
FORCED = (
  'forced_draft'  # I32 `[rows, 2]`: exit and drafts of the next rounds; the first row's count.
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftPlan(LocalPlan):
  """A `StepPlan` of one round of speculation per step: up to `max_drafts + 1` tokens, losslessly.

  Attributes:
    confidence: what is recorded of the scores that chose a token; a function of scores.
    acceptance: the rule for sampled rows.
    max_drafts: most drafts of a round.
    costs: what rounds cost.
    lane_buckets: numbers of lanes that verification is compiled for.
    fixed: the exit's index and the number of drafts of every round; None chooses by `choose_draft`.
    forced: exit and drafts are read from the state: to measure what rounds cost.
    memory: how much of what was seen of an exit counts after one more token.
    prior: agreement that an exit is thought to have before it was tried.
    prior_weight: tokens' worth of trust in it.
    shadow_period: rounds after which exits that did not draft are compared with the final layer too.
    pending_capacity: as other plans for the same state have it; not used.
    num_top: alternatives whose log-probabilities are recorded per token.
  """

  confidence: Confidence
  acceptance: Acceptance
  max_drafts: int
  costs: DraftCosts
  lane_buckets: tuple[int, ...]
  fixed: tuple[int, int] | None = None
  forced: bool = False
  memory: float = 0.95
  prior: float = 0.7
  prior_weight: float = 2.0
  shadow_period: int = 16
  pending_capacity: int = 1
  num_top: int = 0

  @property
  def width(self) -> int:
    """Lanes of the widest verification."""
    return self.lane_buckets[-1]

  @property
  def overhang(self) -> int:
    """Verification starts at the last token but one at the latest."""
    return max(self.width - 2, self.pending_capacity - 2, 0)

  def init_extra(self, rows: int) -> dict[str, Any]:
    """Statistics of the exits."""
    extra: dict[str, Any] = {STATS: no_stats(rows, len(self.exits))}
    return {**extra, FORCED: jnp.zeros((rows, 2), jnp.int32)} if self.forced else extra

  def advance(
    self, model: ExitLM, params: Params, state: DecodeState, *, visibility: Visibility
  ) -> tuple[DecodeState, Gain]:
    """One round for every active row, drafted at one exit for all, accepted by row."""
    round_ = _Round(plan=self, model=model, params=params, visibility=visibility, before=state)
    return round_.run()


@struct.dataclass
class _Work:
  """What a round carries through its passes.

  Attributes:
    cache: written as the round goes.
    tokens: i32 `[rows, width]`: the newest token, then drafts.
    streams: per segment, `[rows, width, embed]`: the stream after it, by lane.
    features: exit layer -> `[rows, width, embed]`, for LAYER heads.
    draft_scores: `[rows, width - 1, vocab]` that drafts were drawn from; None unless needed.
    confidence: f32 `[rows, width]`, at the exit that drafted.
  """

  cache: KVCache
  tokens: jax.Array
  streams: tuple[jax.Array, ...]
  features: dict[int, jax.Array]
  draft_scores: jax.Array | None
  confidence: jax.Array


@struct.dataclass
class _Ruling:
  """What the final layer says of a round.

  Attributes:
    verdict: which tokens stand.
    confidence: f32 `[rows, width]`, of the final scores.
    scores: what is recorded of them.
  """

  verdict: Verdict
  confidence: jax.Array
  scores: TokenScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Round:
  """One round, with what all its parts read."""

  plan: DraftPlan
  model: ExitLM
  params: Params
  visibility: Visibility
  before: DecodeState

  def run(self) -> tuple[DecodeState, Gain]:
    """The state after the round, and the tokens that stand."""
    plan, state, active = self.plan, self.before, ~self.before.done
    stats: DraftStats = state.aux.extra[STATS]
    exit_index, num_drafts = self._choose(stats, active)
    work = self._draft(self._start(), exit_index, num_drafts)
    work = self._verify(work, exit_index, num_drafts)
    ruling = self._rule(work, num_drafts)
    count = jnp.where(active, ruling.verdict.accepted + 1, 0)
    seen = self._compare(work, ruling.verdict.tokens, count, stats, exit_index)
    stats = remember(stats, exit_index, num_drafts, count, seen, memory=plan.memory)
    return self._after(work, exit_index, num_drafts, stats), self._gain(
      work, ruling, count, exit_index
    )

  # Passes.

  def _choose(self, stats: DraftStats, active: jax.Array) -> tuple[Any, Any]:
    if self.plan.fixed is not None:
      return self.plan.fixed
    if self.plan.forced:
      exit_index, num_drafts = self.before.aux.extra[FORCED][0]
      return exit_index, num_drafts
    return choose_draft(
      stats,
      active,
      self.plan.costs,
      prior=self.plan.prior,
      prior_weight=self.plan.prior_weight,
    )

  def _start(self) -> _Work:
    plan, config, state = self.plan, self.model.config, self.before
    rows, width = state.done.shape[0], plan.width
    newest = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1, mode='clip')
    stream = jnp.zeros((rows, width, config.embed_dim), config.precision.dtype)
    keeps_scores = plan.acceptance is Acceptance.REJECTION
    scores = jnp.zeros((rows, width - 1, config.vocab_size), scores_dtype(self.model))
    return _Work(
      cache=state.cache,
      tokens=jnp.pad(newest, ((0, 0), (0, width - 1))),
      streams=(stream,) * len(plan.segments),
      features=dict.fromkeys(plan.head_layers, stream),
      draft_scores=scores if keeps_scores else None,
      confidence=jnp.zeros((rows, width), jnp.float32),
    )

  def _draft(self, work: _Work, exit_index: Any, num_drafts: Any) -> _Work:
    """One lane at a time through the layers up to the exit; the last draft passes without a head."""

    def one_lane(carry: tuple[jax.Array, _Work]) -> tuple[jax.Array, _Work]:
      lane, work = carry
      for segment in range(len(self.plan.segments)):
        work = _when(
          segment <= exit_index,
          lambda work, segment=segment: self._pass(work, segment, lane, 1, 1),
          work,
        )
      for index in range(len(self.plan.exits)):
        if self.plan.fixed is not None and index != exit_index:
          continue
        work = _when(
          (exit_index == index) & (lane < num_drafts),
          lambda work, index=index: self._propose(work, index, lane),
          work,
        )
      return lane + 1, work

    def unfinished(carry: tuple[jax.Array, _Work]) -> jax.Array:
      return carry[0] <= num_drafts

    return jax.lax.while_loop(unfinished, one_lane, (jnp.int32(0), work))[1]

  def _verify(self, work: _Work, exit_index: Any, num_drafts: Any) -> _Work:
    """All lanes at once through the layers behind the exit."""
    for segment in range(1, len(self.plan.segments)):
      for previous, lanes in self._buckets():
        fits = (num_drafts < lanes) & (num_drafts >= previous)
        work = _when(
          (segment > exit_index) & fits,
          lambda work, segment=segment, lanes=lanes: self._pass(
            work, segment, 0, lanes, num_drafts + 1
          ),
          work,
        )
    return work

  def _pass(self, work: _Work, segment: int, first: Any, num_lanes: int, count: Any) -> _Work:
    """Runs a segment over lanes `first, ...`, of which `count` are meant."""
    layers, state = self.plan.segments[segment], self.before
    active = (~state.done).astype(jnp.int32)
    lanes = consecutive_lanes(state.length - 1 + first, active * count, num_lanes=num_lanes)
    if segment == 0:
      tokens = jax.lax.dynamic_slice_in_dim(work.tokens, first, num_lanes, axis=1)
      hidden = self.model.embed(self.params, tokens)
    else:
      hidden = jax.lax.dynamic_slice_in_dim(work.streams[segment - 1], first, num_lanes, axis=1)
    after = extend(
      self.model, self.params, work.cache, hidden, lanes, layers=layers, visibility=self.visibility
    )
    streams = list(work.streams)
    streams[segment] = _put(streams[segment], after.hidden, first)
    features = {
      layer: _put(kept, after.head_features[layer], first) if layer in after.head_features else kept
      for layer, kept in work.features.items()
    }
    return dataclasses.replace(work, cache=after.cache, streams=tuple(streams), features=features)

  def _propose(self, work: _Work, index: int, lane: jax.Array) -> _Work:
    """Chooses the token after `lane` from an exit's scores."""
    scores = self._exit_scores(work, index, lane, 1)[:, 0]
    state = self.before
    token = choose_tokens(scores, state.requests, state.step + lane)
    confidence = self.plan.confidence(scores).astype(jnp.float32)
    kept = work.draft_scores
    if kept is not None:
      kept = _put(kept, scores[:, None], lane)
    return dataclasses.replace(
      work,
      tokens=_put(work.tokens, token[:, None], lane + 1),
      draft_scores=kept,
      confidence=_put(work.confidence, confidence[:, None], lane),
    )

  # Scores.

  def _exit_scores(self, work: _Work, index: int, first: Any, num_lanes: int) -> jax.Array:
    """`[rows, num_lanes, vocab]` of an exit, or of the final head."""
    exits = self.plan.exits
    exit_config = exits[index] if index < len(exits) else None
    at_exit = work.streams[index]
    if exit_config is not None and exit_config.head is HeadKind.LAYER:
      at_exit = work.features[exit_config.layer]
    at_exit = jax.lax.dynamic_slice_in_dim(at_exit, first, num_lanes, axis=1)
    flat = at_exit.reshape(-1, at_exit.shape[-1])
    scores = head_logits(self.model, self.params, exit_config, flat)
    return scores.reshape(*at_exit.shape[:2], -1)

  def _rule(self, work: _Work, num_drafts: Any) -> _Ruling:
    """Final scores of the lanes that are meant, and what follows from them.

    All that reads scores happens here, in the bucket of lanes that is due: over a vocabulary even a
    softmax is dear, and a plain step has one lane.
    """
    ruling = self._no_ruling(work)
    # Plain steps, which draft nothing, have a bucket of their own.
    for previous, lanes in ((0, 1), *((max(p, 1), n) for p, n in self._buckets())):
      ruling = _when(
        (num_drafts < lanes) & (num_drafts >= previous),
        lambda _, lanes=lanes: self._rule_lanes(work, num_drafts, lanes),
        ruling,
      )
    return ruling

  def _rule_lanes(self, work: _Work, num_drafts: Any, lanes: int) -> _Ruling:
    plan, state = self.plan, self.before
    scores = self._exit_scores(work, len(plan.exits), 0, lanes)
    drafts = work.tokens[:, 1:lanes]
    draft_scores = None if work.draft_scores is None else work.draft_scores[:, : lanes - 1]
    verdict = judge(drafts, num_drafts, scores, draft_scores, state.requests, state.step)
    ruling = _Ruling(
      verdict=verdict,
      confidence=plan.confidence(scores).astype(jnp.float32),
      scores=token_scores(scores, verdict.tokens, num_top=plan.num_top),
    )

    def widen(array: jax.Array) -> jax.Array:
      if array.ndim == 1:  # By row.
        return array
      return jnp.pad(array, ((0, 0), (0, plan.width - lanes), *((0, 0),) * (array.ndim - 2)))

    return jax.tree.map(widen, ruling)

  def _no_ruling(self, work: _Work) -> _Ruling:
    rows, width = work.tokens.shape
    floats = jnp.zeros((rows, width), jnp.float32)
    top = jnp.zeros((rows, width, self.plan.num_top), jnp.float32)
    return _Ruling(
      verdict=Verdict(
        tokens=jnp.zeros_like(work.tokens), accepted=jnp.zeros((rows,), work.tokens.dtype)
      ),
      confidence=floats,
      scores=TokenScores(log_prob=floats, top_ids=top.astype(jnp.int32), top_log_probs=top),
    )

  def _buckets(self) -> tuple[tuple[int, int], ...]:
    """Numbers of lanes, each with the one before."""
    lanes = self.plan.lane_buckets
    return tuple(zip((0, *lanes[:-1]), lanes, strict=True))

  # Results.

  def _compare(
    self,
    work: _Work,
    tokens: jax.Array,
    count: jax.Array,
    stats: DraftStats,
    exit_index: Any,
  ) -> tuple[jax.Array, jax.Array]:
    """Tokens on which exits that did not draft agreed with the final layer, and how many were compared.

    Both f32 `[rows, exits]`: zeros but in every `shadow_period`-th round, since heads cost.
    """
    plan, state = self.plan, self.before
    nothing = jnp.zeros_like(stats.agreed)
    if plan.fixed is not None:
      return nothing, nothing
    due = jnp.max(stats.rounds) % plan.shadow_period == plan.shadow_period - 1

    others = jnp.arange(len(plan.exits)) != exit_index

    def compare(_: Any) -> tuple[jax.Array, jax.Array]:
      agreed = []
      meant = jnp.arange(plan.width) < count[:, None]
      for index in range(len(plan.exits)):
        scores = self._exit_scores(work, index, 0, plan.width)
        chosen = choose_lanes(scores, state.requests, state.step)
        agreed.append(jnp.sum((chosen == tokens) & meant, axis=1))
      compared = jnp.where(others, count[:, None], 0).astype(jnp.float32)
      return jnp.where(others, jnp.stack(agreed, axis=1), 0).astype(jnp.float32), compared

    # Plain steps fill all streams, drafts those up to their exit, and verification the others.
    return run_if(due, compare, (nothing, nothing))

  def _after(self, work: _Work, exit_index: Any, num_drafts: Any, stats: DraftStats) -> DecodeState:
    state, plan = self.before, self.plan
    active = (~state.done).astype(jnp.int32)[:, None]
    shallow = jnp.arange(len(plan.segments)) <= exit_index
    passes = jnp.where(shallow, num_drafts + 1, 1)
    fed = (state.length - 1 + num_drafts + 1)[:, None]
    return dataclasses.replace(
      state,
      cache=work.cache,
      fill=jnp.where(active > 0, fed, state.fill),
      aux=dataclasses.replace(
        state.aux,
        passes=state.aux.passes + active * passes,
        extra={**state.aux.extra, STATS: stats},
      ),
    )

  def _gain(self, work: _Work, ruling: _Ruling, count: jax.Array, exit_index: Any) -> Gain:
    """Accepted drafts are booked at their exit, the final layer's own token at the last layer."""
    plan, tokens = self.plan, ruling.verdict.tokens
    depths = jnp.asarray([*(item.layer for item in plan.exits), plan.num_layers], jnp.int32)
    drafted = jnp.arange(plan.width) < count[:, None] - 1
    return Gain(
      tokens=tokens,
      count=count,
      scores=ruling.scores,
      exit_layer=jnp.where(drafted, depths[exit_index], plan.num_layers),
      confidence=jnp.where(drafted, work.confidence, ruling.confidence),
      agreement=jnp.full_like(tokens, Agreement.SAME),
    )


def _put(array: jax.Array, update: jax.Array, lane: Any) -> jax.Array:
  """`array` `[rows, width, ...]` with `update` `[rows, lanes, ...]` at `lane`."""
  return jax.lax.dynamic_update_slice_in_dim(array, update.astype(array.dtype), lane, axis=1)


def _when(wanted: Any, act: Callable[[Any], Any], carry: Any) -> Any:
  """`act(carry)` if wanted, decided now if that is known."""
  if isinstance(wanted, bool):
    return act(carry) if wanted else carry
  return run_if(wanted, act, carry)
