"""Which drafts stand: exact rules, greedy and sampling, by row."""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
from flax import struct

from exitax.decode.sampler import choose_tokens, filter_logits, token_key
from exitax.decode.state import Requests


class Acceptance(enum.Enum):
  """How drafts of sampled rows are judged; both leave the final layer's distribution unchanged.

  Greedy rows accept a draft if it is the final layer's best token, under both.
  """

  # The final layer chooses with the random numbers that it would have used alone, and a draft stands
  # if it is that choice. The text for a seed is that of full decoding, whatever was drafted.
  COUPLED = 'coupled'
  # A draft x stands with probability min(1, p(x) / q(x)), otherwise (p - q)+ is drawn from
  # (arXiv 2211.17192). Accepts more often, and the text for a seed depends on what was drafted.
  REJECTION = 'rejection'


@struct.dataclass
class Verdict:
  """Tokens that follow from a round.

  Attributes:
    tokens: i32 `[rows, lanes]`; the first `accepted + 1` of a row stand.
    accepted: i32 `[rows]`, drafts that stand.
  """

  tokens: jax.Array
  accepted: jax.Array


def judge(
  drafts: jax.Array,
  num_drafts: jax.Array | int,
  scores: jax.Array,
  draft_scores: jax.Array | None,
  requests: Requests,
  step: jax.Array,
) -> Verdict:
  """Accepts a run of drafts and adds one token of the final layer.

  Args:
    drafts: i32 `[rows, lanes - 1]`; the first `num_drafts` are meant.
    num_drafts: how many were drafted.
    scores: `[rows, lanes, vocab]` of the final layer; lane i has seen drafts before i.
    draft_scores: `[rows, lanes - 1, vocab]` that drafts were drawn from; None for COUPLED.
    requests: settings of the rows.
    step: i32 `[rows]`, tokens generated before the round.
  """
  own = choose_lanes(scores, requests, step)
  stands = drafts == own[:, :-1]
  if draft_scores is None:
    return Verdict(tokens=own, accepted=_leading(stands, num_drafts))
  samples = (requests.temperature > 0.0)[:, None]

  def reject() -> Verdict:
    lanes, width = scores.shape[1], drafts.shape[1]
    flat = repeat_requests(requests, width)
    p = jax.nn.softmax(_filtered(scores[:, :-1], flat), axis=-1)
    q = jax.nn.softmax(_filtered(draft_scores, flat), axis=-1)
    keys = _keys(requests, step, width)
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1))))(keys)
    at_draft = (
      jnp.take_along_axis(array, drafts[:, :, None], axis=-1)[:, :, 0] for array in (p, q)
    )
    p_draft, q_draft = at_draft
    accepted = _leading(jnp.where(samples, uniform * q_draft < p_draft, stands), num_drafts)
    rest = jnp.maximum(p - q, 0.0)
    # Equal distributions leave no rest; then every draft was accepted and this is not read.
    rest = jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p)
    noise = jax.vmap(
      jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, 2), rest.shape[2:]))
    )
    redrawn = jnp.argmax(jnp.log(rest) + noise(keys), axis=-1).astype(jnp.int32)
    lane = jnp.arange(lanes)
    padded = jnp.pad(redrawn, ((0, 0), (0, 1)))
    # After a full run the final layer draws its own token.
    refused = jnp.where((lane < num_drafts)[None], padded, own)
    tokens = jnp.where(lane < accepted[:, None], jnp.pad(drafts, ((0, 0), (0, 1))), refused)
    return Verdict(tokens=jnp.where(samples, tokens, own), accepted=accepted)

  return jax.lax.cond(
    jnp.any(samples),
    reject,
    lambda: Verdict(tokens=own, accepted=_leading(stands, num_drafts)),
  )


def choose_lanes(scores: jax.Array, requests: Requests, step: jax.Array) -> jax.Array:
  """`choose_tokens` for lanes that follow each other: `[rows, lanes, vocab]` to i32 `[rows, lanes]`."""
  rows, lanes, vocab = scores.shape
  steps = (step[:, None] + jnp.arange(lanes)).reshape(-1)
  flat = choose_tokens(scores.reshape(-1, vocab), repeat_requests(requests, lanes), steps)
  return flat.reshape(rows, lanes)


def repeat_requests(requests: Requests, lanes: int) -> Requests:
  """Each row's settings once per lane, `[rows * lanes]`."""
  return jax.tree.map(lambda array: jnp.repeat(jnp.asarray(array), lanes, axis=0), requests)


def _leading(stands: jax.Array, num_drafts: jax.Array | int) -> jax.Array:
  """Length of the leading run of True among the first `num_drafts`, i32 `[rows]`."""
  meant = jnp.arange(stands.shape[1]) < num_drafts
  return jnp.sum(jnp.cumprod((stands & meant).astype(jnp.int32), axis=1), axis=1)


def _filtered(scores: jax.Array, requests: Requests) -> jax.Array:
  vocab = scores.shape[-1]
  return filter_logits(scores.reshape(-1, vocab), requests).reshape(scores.shape)


def _keys(requests: Requests, step: jax.Array, lanes: int) -> jax.Array:
  steps = step[:, None] + jnp.arange(lanes)
  per_lane = jax.vmap(token_key, in_axes=(None, 0))
  return jax.vmap(per_lane)(jnp.asarray(requests.seed), steps)
