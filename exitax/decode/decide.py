"""Where a token stops: exits judge the rows that no exit has stopped yet, one exit after the other."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.confidence import Confidence, ExitView
from exitax.decode.plan import Agreement
from exitax.decode.scores import head_logits, scores_dtype
from exitax.decode.state import DecodeState
from exitax.models import ExitConfig, ExitLM, Params


class ExitRule(Protocol):
  """What decisions depend on: the static part of a thresholded plan."""

  @property
  def exits(self) -> tuple[ExitConfig, ...]:
    """Exits in use, by ascending layer."""
    ...

  @property
  def num_layers(self) -> int:
    """Layers of the model."""
    ...

  @property
  def confidence(self) -> Confidence:
    """What is compared with the thresholds."""
    ...

  @property
  def patience(self) -> int:
    """Exits in a row that must agree, for `Confidence.PATIENCE`."""
    ...


@struct.dataclass
class Decision:
  """Where each row stopped, and on which scores.

  Attributes:
    undecided: bool `[rows]`, active rows that no exit has stopped yet.
    logits: `[rows, vocab]` of the exit that decided.
    exit_layer: i32 `[rows]`, layers run before it.
    confidence: f32 `[rows]`.
    agreement: i32 `[rows]`, of `Agreement`.
    stream: `[rows, embed]`, the stream at the exit that decided; for copied states alone.
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
class AtExit:
  """Each row's newest token where an exit judges it, every array `[rows, embed]`.

  Attributes:
    before: the stream at the exit before, or the embedding.
    stream: the stream at this exit.
    features: what the exit's head reads: the stream, or, of a LAYER head, its features.
  """

  before: jax.Array
  stream: jax.Array
  features: jax.Array


def no_decision(model: ExitLM, undecided: jax.Array) -> Decision:
  """Before the first exit; `undecided` is bool `[rows]`."""
  shape, config = undecided.shape, model.config
  return Decision(
    undecided=undecided,
    logits=jnp.zeros((*shape, config.vocab_size), scores_dtype(model)),
    exit_layer=jnp.zeros(shape, jnp.int32),
    confidence=jnp.zeros(shape, jnp.float32),
    agreement=jnp.full(shape, Agreement.UNKNOWN, jnp.int32),
    stream=jnp.zeros((*shape, config.embed_dim), config.precision.dtype),
    best=jnp.full(shape, -1, jnp.int32),
    agreeing=jnp.zeros(shape, jnp.int32),
  )


def decide_at_exit(
  model: ExitLM,
  params: Params,
  decision: Decision,
  at: AtExit,
  index: int,
  *,
  thresholds: jax.Array,
  rule: ExitRule,
) -> Decision:
  """Stops the rows that are confident enough.

  Scores cost a vocabulary matrix: they are made if a row might need them to decide, or, where the
  confidence does not read scores, if some row stops.

  Args:
    model: the model.
    params: parameters; only the exit's are read.
    decision: what earlier exits have decided.
    at: the newest tokens.
    index: which of the rule's exits.
    thresholds: f32 `[rows]`, this exit's.
    rule: exits and measure.
  """
  undecided = decision.undecided
  if rule.confidence.reads_scores:
    # Thresholds of 1 are never met: rows that ask for full depth pay for no other scores.
    could_stop = undecided & (thresholds < 1.0) if rule.confidence.reads_one_exit else undecided
    logits = _logits_if(model, params, jnp.any(could_stop), at, index, rule=rule)
    decision = _count_agreeing(decision, logits, rule=rule)
    confidence = _confidence(params, decision, at, logits, index, rule=rule)
    stops = undecided & (confidence > thresholds)
  else:
    confidence = _confidence(params, decision, at, None, index, rule=rule)
    stops = undecided & (confidence > thresholds)
    logits = _logits_if(model, params, jnp.any(stops), at, index, rule=rule)
  return _take(decision, stops, logits, confidence, at.stream, rule.exits[index].layer)


def decide_at_end(
  model: ExitLM,
  params: Params,
  decision: Decision,
  at: AtExit,
  *,
  rule: ExitRule,
  compared: jax.Array | None = None,
) -> Decision:
  """The final head decides for all rows that are left.

  Args:
    model: the model.
    params: parameters; only the final head's are read.
    decision: what the exits have decided.
    at: the newest tokens.
    rule: exits and measure.
    compared: bool `[rows]`, those of which it is to be known whether the final layer agrees with the
      exit; None compares none.
  """
  wanted = decision.undecided if compared is None else compared
  logits = _logits_if(model, params, jnp.any(wanted), at, len(rule.exits), rule=rule)
  decision = _count_agreeing(decision, logits, rule=rule)
  confidence = _confidence(params, decision, at, logits, len(rule.exits), rule=rule)
  ends_here = decision.undecided
  decision = _take(decision, ends_here, logits, confidence, at.stream, rule.num_layers)
  agreement = jnp.where(ends_here, Agreement.SAME, decision.agreement)
  if compared is not None:
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
  at: AtExit,
  logits: jax.Array | None,
  index: int,
  *,
  rule: ExitRule,
) -> jax.Array:
  """f32 `[rows]`. A learned classifier judges exits only: the final layer's is 1."""
  measure, final = rule.confidence, index == len(rule.exits)
  if measure is Confidence.CLASSIFIER and final:
    return jnp.ones(decision.undecided.shape, jnp.float32)
  classifier = None
  if measure is Confidence.CLASSIFIER:
    classifier = params['confidence'][str(rule.exits[index].layer)]
  view = ExitView(
    scores=logits,
    before=at.before,
    stream=at.stream,
    agreeing=decision.agreeing,
    patience=rule.patience,
    classifier=classifier,
  )
  return measure.of_exit(view).astype(jnp.float32)


def _count_agreeing(decision: Decision, logits: jax.Array, *, rule: ExitRule) -> Decision:
  """Exits in a row, this one included, that rank the same token first."""
  if rule.confidence is not Confidence.PATIENCE:
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
  model: ExitLM, params: Params, wanted: jax.Array, at: AtExit, index: int, *, rule: ExitRule
) -> jax.Array:
  """Scores `[rows, vocab]` of an exit (of the final head after them); zeros if nobody wants them."""
  exit_config = rule.exits[index] if index < len(rule.exits) else None

  def score() -> jax.Array:
    return head_logits(model, params, exit_config, at.features)

  if not rule.exits:  # The only head is always wanted.
    return score()
  shape = (at.features.shape[0], model.config.vocab_size)
  nothing = jnp.zeros(shape, scores_dtype(model))
  return jnp.asarray(jax.lax.cond(wanted, score, lambda: nothing))
