"""DecodeState: everything that decoding carries from one step to the next."""

from __future__ import annotations

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from exitax.decode.cache import KVCache, init_cache
from exitax.decode.policies import ExitPlan
from exitax.models import ModelConfig

# What `stop_tokens` is padded with: no token has this id.
NO_TOKEN = -1


class StopReason(enum.IntEnum):
  """Why a row ended."""

  RUNNING = 0
  STOP_TOKEN = 1
  BUDGET = 2


class Agreement(enum.IntEnum):
  """Whether the final layer would have ranked the same token first."""

  UNKNOWN = -1
  DIFFERENT = 0
  SAME = 1


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
  """What exit policies keep in `DecodeState.aux`, by column of the generated token.

  Attributes:
    exit_layer: i32 `[rows, capacity]`, layers run when the token was chosen.
    confidence: f32 `[rows, capacity]`, at the exit that chose it.
    agreement: i32 `[rows, capacity]`, of `Agreement`.
    passes: i32 `[rows, num_segments]`, how often each segment ran for the row since prefill.
  """

  exit_layer: jax.Array
  confidence: jax.Array
  agreement: jax.Array
  passes: jax.Array


@struct.dataclass
class DecodeState:
  """One struct for every way of decoding; each array's first axis is the row.

  A row has fed the tokens before `length - 1` to the model; the last one is fed by the next step.

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
      tokens `fill[s] .. fill[s - 1] - 1`, from index 0; the rest is stale.
    aux: arrays that belong to the policies.
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

  @property
  def length(self) -> jax.Array:
    """Tokens of the row so far, i32 `[rows]`."""
    return self.prompt_length + self.step


@functools.partial(jax.jit, static_argnames=('config', 'plan'))
def init_state(
  config: ModelConfig,
  plan: ExitPlan,
  *,
  tokens: jax.Array,
  prompt_length: jax.Array,
  requests: Requests,
) -> DecodeState:
  """A state before prefill.

  Args:
    config: the model.
    plan: the policy's static part.
    tokens: i32 `[rows, capacity]`, prompts from column 0.
    prompt_length: i32 `[rows]`, at least 1; 0 marks a row without a request, which is done.
    requests: settings.
  """
  rows, capacity = tokens.shape
  segments = len(plan.segments)
  pending_shape = (rows, plan.pending_capacity, config.embed_dim)
  return DecodeState(
    cache=init_cache(config, rows=rows, capacity=capacity, head_layers=plan.head_layers),
    tokens=jnp.asarray(tokens, jnp.int32),
    prompt_length=jnp.asarray(prompt_length, jnp.int32),
    step=jnp.zeros((rows,), jnp.int32),
    done=jnp.asarray(prompt_length) < 1,
    stop_reason=jnp.zeros((rows,), jnp.int32),
    requests=jax.tree.map(jnp.asarray, requests),
    fill=jnp.zeros((rows, segments), jnp.int32),
    pending=tuple(jnp.zeros(pending_shape, config.precision.dtype) for _ in range(segments - 1)),
    aux=ExitRecord(
      exit_layer=jnp.zeros((rows, capacity), jnp.int32),
      confidence=jnp.zeros((rows, capacity), jnp.float32),
      agreement=jnp.full((rows, capacity), Agreement.UNKNOWN, jnp.int32),
      passes=jnp.zeros((rows, segments), jnp.int32),
    ),
  )


def gather_rows(state: Any, rows: jax.Array) -> Any:
  """The given rows of a state (or cache), in that order; a row may occur more than once (a fork)."""
  return jax.tree.map(lambda array: array[rows], state)
