"""Seconds of decoding steps alone, prompts aside."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np

from exitax import decode
from exitax.models import ExitLM, Params


class StepTimer:
  """A policy on some prompts, compiled: `seconds` of generating `new_tokens` for each, greedily."""

  def __init__(
    self,
    model: ExitLM,
    params: Params,
    policy: decode.ExitPolicy,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    cache_format: decode.CacheFormat = decode.CacheFormat.COMPUTE,
  ) -> None:
    """Compiles by running once; `params` are those of `decode.prepare_params`."""
    self.policy, self.new_tokens = policy, new_tokens
    self.batch, self._cache_format = len(prompts), cache_format
    self._model, self._params, self._prompts = model, params, prompts
    self._plan = policy.plan(model.config)
    self.seconds()

  def seconds(self) -> float:
    """Seconds of all steps; `completions` and `state` are what came out."""
    state = jax.block_until_ready(self._prefilled())
    start = time.perf_counter()
    self.state = jax.block_until_ready(
      decode.run_steps(
        self._model,
        self._params,
        state,
        self.new_tokens * self._plan.placement.steps_per_token,
        plan=self._plan,
        visibility=decode.Causal(self._model.config.sliding_window),
      )
    )
    return time.perf_counter() - start

  @property
  def completions(self) -> tuple[decode.Completion, ...]:
    """What the last run generated."""
    return decode.completions_since(self.state, np.zeros(self.batch, np.int32))

  @property
  def tokens(self) -> list[list[int]]:
    """Its tokens."""
    return [completion.tokens.tolist() for completion in self.completions]

  @property
  def effective_layers(self) -> float:
    """Mean layers per token."""
    return float(np.mean([completion.effective_layers for completion in self.completions]))

  def _prefilled(self) -> decode.DecodeState:
    requests = decode.make_requests(
      self._model.config,
      policy=self.policy,
      samplers=[decode.Sampler()] * self.batch,
      stop_tokens=(),
      seeds=range(self.batch),
      budgets=[self.new_tokens] * self.batch,
    )
    return decode.begin(
      self._model,
      self._params,
      self._prompts,
      policy=self.policy,
      requests=requests,
      max_new_tokens=self.new_tokens,
      cache_format=self._cache_format,
    )
