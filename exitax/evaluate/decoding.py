"""Greedy decoding of held-out prompts, one at a time, with a clock around the steps alone."""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np

from exitax.data import Data
from exitax.decode import (
  Causal,
  Confidence,
  DecodeState,
  DeferredExit,
  ExitPolicy,
  FullDepth,
  Sampler,
  StepPlan,
  init_state,
  make_requests,
  prefill_chunk,
  prepare_params,
  run_steps,
)
from exitax.decode import completions_since as read_completions
from exitax.errors import UserError
from exitax.evaluate.speed import Decoded
from exitax.models import ExitLM, Params

# As `exitax.decode.generate` rounds: every setting gets a cache of the same size.
_CAPACITY_STEP = 64


class PromptDecoder:
  """A `DecodeFn` over given prompts: prefill is left out of its times, as it never exits early.

  It composes `exitax.decode`'s own primitives, as `generate` does, to put the clock between them.
  """

  def __init__(
    self,
    model: ExitLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    confidence: Confidence,
    settings_prefix: str = '',
  ) -> None:
    """Keeps a copy of the parameters in the layout of decoding.

    Args:
      model: the model.
      params: its parameters.
      prompts: token ids, at least one each.
      new_tokens: tokens to generate after each.
      confidence: what thresholds are compared with.
      settings_prefix: what the caller's settings have before `prompt_tokens` and `new_tokens`.

    Raises:
      UserError: prompts and new tokens do not fit the model's context.
    """
    longest = max(map(len, prompts))
    if longest + new_tokens > model.config.max_length:
      raise UserError(
        f'{settings_prefix}prompt_tokens={longest} plus {settings_prefix}new_tokens={new_tokens} '
        f'exceeds the context of {model.config.max_length}: lower one of them'
      )
    self._model = model
    self._params = prepare_params(model, params)
    self._prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
    self._longest = longest
    self._new_tokens = new_tokens
    self._confidence = confidence
    self._visibility = Causal(model.config.sliding_window)

  @property
  def num_prompts(self) -> int:
    """How many prompts there are."""
    return len(self._prompts)

  @property
  def prompt_tokens(self) -> int:
    """Length of the longest."""
    return self._longest

  @property
  def has_exits(self) -> bool:
    """Whether a threshold can change anything."""
    return bool(self._model.config.exits)

  def capacity(self, plan: StepPlan) -> int:
    """Columns of the cache; room for the waiting tokens of a policy that defers is always there."""
    waiting = max(DeferredExit(threshold=1.0).pending_capacity, plan.overhang)
    needed = self._longest + self._new_tokens + waiting
    return -(-needed // _CAPACITY_STEP) * _CAPACITY_STEP

  def __call__(self, prompt: int, threshold: float | None) -> Decoded:
    """Decodes prompt number `prompt`; no threshold means every layer for every token."""
    if threshold is None:
      return self.decode(prompt, FullDepth(confidence=self._confidence))
    return self.decode(prompt, DeferredExit(threshold=threshold, confidence=self._confidence))

  def decode(self, prompt: int, policy: ExitPolicy) -> Decoded:
    """Decodes prompt number `prompt` with a policy."""
    plan = policy.plan(self._model.config)
    state = jax.block_until_ready(self._prefilled(self._prompts[prompt], policy, plan))
    start = time.perf_counter()
    state = run_steps(
      self._model,
      self._params,
      state,
      self._new_tokens,
      plan=plan,
      visibility=self._visibility,
    )
    jax.block_until_ready(state.tokens)
    seconds = time.perf_counter() - start
    (completion,) = read_completions(state, np.zeros(1, np.int32))
    return Decoded(
      tokens=completion.tokens,
      exit_layers=completion.exit_layers,
      layer_passes=int(completion.passes @ [len(segment) for segment in plan.segments]),
      seconds=seconds,
    )

  def _prefilled(self, prompt: np.ndarray, policy: ExitPolicy, plan: StepPlan) -> DecodeState:
    config = self._model.config
    requests = make_requests(
      config,
      policy=policy,
      samplers=[Sampler()],
      stop_tokens=(),
      seeds=[0],
      budgets=[self._new_tokens],
    )
    tokens = np.zeros((1, self.capacity(plan)), np.int32)
    tokens[0, : len(prompt)] = prompt
    lengths = np.asarray([len(prompt)], np.int32)
    state = init_state(config, plan, tokens=tokens, prompt_length=lengths, requests=requests)
    return prefill_chunk(
      self._model,
      self._params,
      state,
      chunk=max(self._longest - 1, 1),
      visibility=self._visibility,
    )


def held_out_prompts(data: Data, *, count: int, num_tokens: int) -> list[list[int]]:
  """The first `num_tokens` ids of `count` held-out documents, spread evenly over all tasks.

  Documents that go on after that are preferred; where there are none, prompts are shorter. Fewer
  documents than `count` give fewer prompts.
  """
  documents = [
    task.held_out.tokens[begin:end]
    for task in data.corpus.tasks
    for begin, end in zip(task.held_out.offsets[:-1], task.held_out.offsets[1:], strict=True)
  ]
  # The last id ends the document: nothing should follow it.
  long_enough = [document for document in documents if len(document) > num_tokens]
  chosen = long_enough or documents
  count = min(count, len(chosen))
  return [
    [int(token) for token in chosen[i * len(chosen) // count][:-1][:num_tokens]]
    for i in range(count)
  ]
