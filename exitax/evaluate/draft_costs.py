"""What rounds of speculation cost on this machine, in seconds."""

from __future__ import annotations

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from exitax.data import Progress, quiet
from exitax.decode import (
  FORCED,
  Causal,
  DecodeState,
  DraftCosts,
  Sampler,
  Speculative,
  begin,
  draft_buckets,
  make_requests,
  run_steps,
)
from exitax.models import ExitLM, Params

_ROUNDS = 6


def measure_draft_costs(
  model: ExitLM,
  params: Params,
  *,
  layers: tuple[int, ...] | None = None,
  max_drafts: int = 7,
  rows: int = 1,
  length: int = 128,
  repeats: int = 5,
  progress: Progress = quiet,
) -> DraftCosts:
  """Seconds of rounds for every exit and number of drafts, and of a plain step.

  The program is the one that speculates: exit and drafts are data to it, so it is compiled once. What
  a round costs does not depend on what is accepted. Between the numbers of drafts at the ends of each
  bucket of lanes, seconds are interpolated.

  Args:
    model: the model, with exits.
    params: parameters after `prepare_params`.
    layers: exits to measure; None means all.
    max_drafts: most drafts of a round.
    rows: requests in the batch.
    length: tokens of a prompt and its text together: attention reads all columns of a cache, and
      there are as many.
    repeats: timings of each, in turns; the median counts.
    progress: shown while it takes.
  """
  policy = Speculative(layers=layers, max_drafts=max_drafts, forced=True)
  plan = policy.plan(model.config)
  num_exits = len(plan.exits)
  cases = [(num_exits, 0)]
  cases += [(j, d) for j in range(num_exits) for d in measured_lengths(max_drafts)]
  budget = _ROUNDS * (max_drafts + 1)
  context = max(min(length, model.config.max_length) - budget, 1)
  requests = make_requests(
    model.config,
    policy=policy,
    samplers=[Sampler()] * rows,
    stop_tokens=(),
    seeds=range(rows),
    budgets=[budget] * rows,
  )
  prompts = np.random.default_rng(0).integers(0, model.config.vocab_size, (rows, context)).tolist()
  start = begin(model, params, prompts, policy=policy, requests=requests, max_new_tokens=budget)
  visibility = Causal(model.config.sliding_window)
  seconds: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
  turns = [(case, turn) for turn in range(repeats + 1) for case in cases]
  for case, turn in progress(turns, total=len(turns), label='timing rounds'):
    state = _forced(jax.tree.map(jnp.copy, start), case)
    jax.block_until_ready(state)
    begun = time.perf_counter()
    state = run_steps(model, params, state, _ROUNDS, plan=plan, visibility=visibility)
    jax.block_until_ready(state.tokens)
    if turn:  # The first turn compiles and warms up.
      seconds[case].append((time.perf_counter() - begun) / _ROUNDS)
  medians = {case: statistics.median(found) for case, found in seconds.items()}
  lengths = np.arange(1, max_drafts + 1)
  rounds = []
  for j in range(num_exits):
    known = [(d, medians[j, d]) for d in measured_lengths(max_drafts)]
    rounds.append(_between(lengths, known, draft_buckets(max_drafts)))
  return DraftCosts(rounds=tuple(rounds), plain=medians[num_exits, 0])


def measured_lengths(max_drafts: int) -> tuple[int, ...]:
  """Numbers of drafts at both ends of every bucket of lanes."""
  ends: list[int] = []
  previous = 1
  for lanes in draft_buckets(max_drafts):
    ends += [previous, min(lanes - 1, max_drafts)]
    previous = lanes
  return tuple(sorted(set(ends)))


def _between(
  lengths: np.ndarray, known: list[tuple[int, float]], buckets: tuple[int, ...]
) -> tuple[float, ...]:
  """Linear within a bucket; from one bucket to the next costs may jump."""
  found = []
  for length in lengths:
    lanes = next(n for n in buckets if n > length)
    inside = [(d, s) for d, s in known if next(n for n in buckets if n > d) == lanes]
    found.append(float(np.interp(length, [d for d, _ in inside], [s for _, s in inside])))
  return tuple(found)


def _forced(state: DecodeState, case: tuple[int, int]) -> DecodeState:
  choice = jnp.broadcast_to(jnp.asarray(case, jnp.int32), state.aux.extra[FORCED].shape)
  aux = dataclasses.replace(state.aux, extra={**state.aux.extra, FORCED: choice})
  return dataclasses.replace(state, aux=aux)
