"""DecodeState: everything that decoding carries from one step to the next."""

from __future__ import annotations

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from exitax.decode.cache import CacheFormat, KVCache, empty_in_format, with_origins
from exitax.decode.plan import Agreement, StepPlan
from exitax.decode.texts import Grouping
from exitax.models import ModelConfig

# What `stop_tokens` is padded with: no token has this id.
NO_TOKEN = -1


class StopReason(enum.IntEnum):
  """Why a row ended."""

  RUNNING = 0
  STOP_TOKEN = 1
  BUDGET = 2
  STOPPED = 3  # By whoever runs it.


@struct.dataclass
class Requests:
  """Settings of each row; data, so that changing them never recompiles.

  Attributes:
    seed: u32 `[rows]`.
    temperature: f32 `[rows]`; 0 is greedy.
    top_k: i32 `[rows]`; 0 keeps all.
    top_p: f32 `[rows]`.
    min_p: f32 `[rows]`.
    stop_tokens: i32 `[rows, num_stops]`, padded with `NO_TOKEN`.
    budget: i32 `[rows]`, tokens to generate at most.
    thresholds: f32 `[rows, num_exits]`.
  """

  seed: jax.Array | np.ndarray
  temperature: jax.Array | np.ndarray
  top_k: jax.Array | np.ndarray
  top_p: jax.Array | np.ndarray
  min_p: jax.Array | np.ndarray
  stop_tokens: jax.Array | np.ndarray
  budget: jax.Array | np.ndarray
  thresholds: jax.Array | np.ndarray


@struct.dataclass
class ExitRecord:
  """How each token was chosen (`DecodeState.aux`), by column of the generated token.

  Attributes:
    exit_layer: i32 `[rows, capacity]`, layers run when the token was chosen.
    confidence: f32 `[rows, capacity]`, at the exit that chose it.
    agreement: i32 `[rows, capacity]`, of `Agreement`.
    log_prob: f32 `[rows, capacity]`, of the token under the scores it was chosen from, at
      temperature 1 and before any filter.
    top_ids: i32 `[rows, capacity, num_top]`, the best tokens of those scores.
    top_log_probs: f32 `[rows, capacity, num_top]`, theirs.
    passes: i32 `[rows, num_segments]`, how often each segment ran for the row since prefill.
    extra: arrays `[rows, ...]` of the plan's own, by name.
  """

  exit_layer: jax.Array
  confidence: jax.Array
  agreement: jax.Array
  log_prob: jax.Array
  top_ids: jax.Array
  top_log_probs: jax.Array
  passes: jax.Array
  extra: dict[str, Any]


@struct.dataclass
class DecodeState:
  """One struct for every way of decoding; each array's first axis is the row.

  A row has fed the tokens before `length - 1` to the model; the last one is fed by the next step.

  In groups several texts share a row of the cache (see `texts`): `cache`, `fill`, `pending` and
  `aux.passes` have an entry per row, everything else one per text, wherever "row" is said.

  Attributes:
    cache: keys and values.
    tokens: i32 `[rows, capacity]`, prompt and generated ones.
    prompt_length: i32 `[rows]`.
    step: i32 `[rows]`, tokens generated.
    done: bool `[rows]`.
    stop_reason: i32 `[rows]`, of `StopReason`.
    requests: settings.
    fill: i32 `[rows, num_segments]`, tokens cached in each segment of layers; falls along a row.
    pending: for each segment after the first, `[rows, pending_capacity, embed]`: its inputs for the
      tokens `fill[s] .. fill[s - 1] - 1`, from index 0; the rest is stale. (A pipeline has one array
      `[rows, stages, embed]`: each stage holds what it is to run next.)
    aux: arrays that belong to the policies.
    group: which row each text is cached in; None where each has its own.
  """

  cache: KVCache
  tokens: jax.Array
  prompt_length: jax.Array
  step: jax.Array
  done: jax.Array
  stop_reason: jax.Array
  requests: Requests
  fill: jax.Array
  pending: tuple[jax.Array, ...]
  aux: Any
  group: Grouping | None = None

  @property
  def length(self) -> jax.Array:
    """Tokens of the row so far, i32 `[rows]`."""
    return self.prompt_length + self.step


@functools.partial(jax.jit, static_argnames=('config', 'plan', 'cache_format', 'cache_shape'))
def init_state(
  config: ModelConfig,
  plan: StepPlan,
  *,
  tokens: jax.Array,
  prompt_length: jax.Array,
  requests: Requests,
  cache_format: CacheFormat = CacheFormat.COMPUTE,
  group: Grouping | None = None,
  cache_shape: tuple[int, int] | None = None,
) -> DecodeState:
  """A state before prefill.

  Args:
    config: the model.
    plan: the policy's static part.
    tokens: i32 `[rows, capacity]`, prompts from column 0.
    prompt_length: i32 `[rows]`, at least 1; 0 marks a row without a request, which is done.
    requests: settings.
    cache_format: how keys and values are kept.
    group: texts that share rows; `tokens` are then those of texts.
    cache_shape: rows and columns of the cache; those of `tokens` by default.
  """
  texts, capacity = tokens.shape
  rows, columns = cache_shape or tokens.shape
  placement, segments = plan.placement, len(plan.segments)
  cache = placement.init_cache(config, rows=rows, capacity=columns, head_layers=plan.head_layers)
  if group is not None:
    cache = with_origins(cache)
  return DecodeState(
    cache=empty_in_format(cache, cache_format),
    tokens=jnp.asarray(tokens, jnp.int32),
    prompt_length=jnp.asarray(prompt_length, jnp.int32),
    step=jnp.zeros((texts,), jnp.int32),
    done=jnp.asarray(prompt_length) < 1,
    stop_reason=jnp.zeros((texts,), jnp.int32),
    requests=jax.tree.map(jnp.asarray, requests),
    fill=jnp.zeros((rows, segments), jnp.int32),
    pending=placement.init_pending(config, plan, rows=rows),
    aux=ExitRecord(
      exit_layer=jnp.zeros((texts, capacity), jnp.int32),
      confidence=jnp.zeros((texts, capacity), jnp.float32),
      agreement=jnp.full((texts, capacity), Agreement.UNKNOWN, jnp.int32),
      log_prob=jnp.zeros((texts, capacity), jnp.float32),
      top_ids=jnp.zeros((texts, capacity, plan.num_top), jnp.int32),
      top_log_probs=jnp.zeros((texts, capacity, plan.num_top), jnp.float32),
      passes=jnp.zeros((rows, segments), jnp.int32),
      extra=plan.init_extra(rows),
    ),
    group=group,
  )


def gather_rows(state: Any, rows: jax.Array) -> Any:
  """The given rows of a state (or cache), in that order; a row may occur more than once (a fork)."""
  return jax.tree.map(lambda array: array[rows], state)
