"""The one loop: prefill in chunks, and steps until every row is done."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from exitax.decode.commit import commit
from exitax.decode.compiling import decode_jit
from exitax.decode.extend import extend
from exitax.decode.lanes import Visibility, consecutive_lanes
from exitax.decode.plan import StepPlan
from exitax.decode.state import DecodeState
from exitax.decode.texts import prompts
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
  prompt, length = prompts(state)
  count = jnp.clip(length - 1 - first, 0, chunk)
  lanes = consecutive_lanes(first, count, num_lanes=chunk)
  tokens = jnp.take_along_axis(prompt, lanes.position, axis=1, mode='clip')
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
  model: ExitLM, params: Params, state: DecodeState, *, plan: StepPlan, visibility: Visibility
) -> DecodeState:
  """Feeds each active row's newest token and appends what follows. Pure; composed by `run_steps`."""
  state, gain = plan.advance(model, params, state, visibility=visibility)
  return commit(state, gain)


@decode_jit(static=('model', 'plan', 'visibility'), donated=('state',))
def run_steps(
  model: ExitLM,
  params: Params,
  state: DecodeState,
  num_steps: jax.Array | int,
  *,
  plan: StepPlan,
  visibility: Visibility,
  rows: jax.Array | None = None,
  at_least: jax.Array | int = 0,
) -> DecodeState:
  """Steps until every row is done, `num_steps` times at most; `state` is donated.

  Args:
    model: the model.
    params: parameters after `prepare_params`.
    state: after prefill.
    num_steps: traced, so that streaming a few tokens per call is the same program.
    plan: the policy's static part.
    visibility: which keys a token sees.
    rows: bool `[rows]`, those to advance; None advances all. Rows of one state may take turns under
      different plans.
    at_least: steps to take although every row is done: texts of groups feed what they have left.
  """
  held = jnp.zeros_like(state.done) if rows is None else ~state.done & ~rows
  state = dataclasses.replace(state, done=state.done | held)

  def unfinished(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
    state, steps = carry
    return (~jnp.all(state.done) | (steps < at_least)) & (steps < num_steps)

  def advance(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
    state, steps = carry
    return step(model, params, state, plan=plan, visibility=visibility), steps + 1

  state, _ = jax.lax.while_loop(unfinished, advance, (state, jnp.int32(0)))
  return dataclasses.replace(state, done=state.done & ~held)
