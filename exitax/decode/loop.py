"""The one loop: prefill in chunks, and steps until every row is done."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from exitax.decode.compiling import decode_jit
from exitax.decode.depth import Decision, pass_depths
from exitax.decode.extend import extend
from exitax.decode.lanes import Visibility, consecutive_lanes
from exitax.decode.policies import ExitPlan
from exitax.decode.sampler import choose_tokens
from exitax.decode.state import DecodeState, StopReason
from exitax.models import ExitLM, Params


@decode_jit(static=('model', 'chunk', 'visibility'), donated=('state',))
def prefill_chunk(
  model: ExitLM, params: Params, state: DecodeState, *, chunk: int, visibility: Visibility
) -> DecodeState:
  """Caches the next `chunk` tokens of each prompt in all layers; `state` is donated.

  The last prompt token is left for the first step, so that prefill needs no scores and steps are
  all alike. Rows whose prompt ends earlier add fewer tokens, or none.
  """
  first = state.fill[:, 0]
  count = jnp.clip(state.prompt_length - 1 - first, 0, chunk)
  lanes = consecutive_lanes(first, count, num_lanes=chunk)
  tokens = jnp.take_along_axis(state.tokens, lanes.position, axis=1, mode='clip')
  after = extend(
    model,
    params,
    state.cache,
    model.embed(params, tokens),
    lanes,
    layers=range(model.config.num_layers),
    visibility=visibility,
  )
  return dataclasses.replace(state, cache=after.cache, fill=state.fill + count[:, None])


def step(
  model: ExitLM, params: Params, state: DecodeState, *, plan: ExitPlan, visibility: Visibility
) -> DecodeState:
  """Feeds each active row's newest token and appends the next one. Pure; composed by `run_steps`."""
  newest = jnp.take_along_axis(state.tokens, state.fill[:, :1], axis=1, mode='clip')
  hidden = model.embed(params, newest)
  state, decision = pass_depths(model, params, state, hidden, plan=plan, visibility=visibility)
  token = choose_tokens(decision.logits, state.requests, state.step)
  return _commit(state, decision, token)


@decode_jit(static=('model', 'plan', 'visibility'), donated=('state',))
def run_steps(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  num_steps: jax.Array | int,
  *,
  plan: ExitPlan,
  visibility: Visibility,
) -> DecodeState:
  """Steps until every row is done, `num_steps` times at most; `state` is donated.

  Args:
    model: the model.
    params: parameters after `prepare_params`.
    state: after prefill.
    num_steps: traced, so that streaming a few tokens per call is the same program.
    plan: the exit policy's static part.
    visibility: which keys a token sees.
  """

  def unfinished(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
    state, steps = carry
    return ~jnp.all(state.done) & (steps < num_steps)

  def advance(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
    state, steps = carry
    return step(model, params, state, plan=plan, visibility=visibility), steps + 1

  state, _ = jax.lax.while_loop(unfinished, advance, (state, jnp.int32(0)))
  return state


def _commit(state: DecodeState, decision: Decision, token: jax.Array) -> DecodeState:
  """Appends the tokens, records how they were chosen, and ends rows."""
  active = ~state.done
  here = (jnp.arange(state.tokens.shape[1]) == state.length[:, None]) & active[:, None]

  def put(array: jax.Array, value: jax.Array) -> jax.Array:
    return jnp.where(here, value[:, None], array)

  generated = state.step + active.astype(jnp.int32)
  stopped = active & jnp.any(token[:, None] == state.requests.stop_tokens, axis=1)
  spent = active & (generated >= state.requests.budget) & ~stopped
  reason = jnp.where(stopped, StopReason.STOP_TOKEN, state.stop_reason)
  return dataclasses.replace(
    state,
    tokens=put(state.tokens, token),
    step=generated,
    done=state.done | stopped | spent,
    stop_reason=jnp.where(spent, StopReason.BUDGET, reason),
    aux=dataclasses.replace(
      state.aux,
      exit_layer=put(state.aux.exit_layer, decision.exit_layer),
      confidence=put(state.aux.confidence, decision.confidence),
      agreement=put(state.aux.agreement, decision.agreement),
    ),
  )
