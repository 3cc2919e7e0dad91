"""The front of decoding: lists of token ids in, tokens with their exit records out."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from exitax.decode.cache import CacheFormat
from exitax.decode.confidence import Confidence
from exitax.decode.lanes import Causal
from exitax.decode.loop import run_steps
from exitax.decode.plan import StepPlan
from exitax.decode.policies import ExitPolicy, FullDepth
from exitax.decode.results import GenerateResult, StreamEvent, completions_since
from exitax.decode.sampler import Sampler
from exitax.decode.state import NO_TOKEN, DecodeState, Requests, init_state
from exitax.errors import UserError
from exitax.models import ExitLM, ModelConfig, Params

# Capacities are multiples of it, so that prompts of similar length share compiled programs.
CAPACITY_STEP = 64
PREFILL_CHUNK = 128


def generate(
  model: ExitLM,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  policy: ExitPolicy = FullDepth(),
  sampler: Sampler | Sequence[Sampler] = Sampler(),
  stop_tokens: Sequence[int] = (),
  seed: int | Sequence[int] = 0,
  prefill_chunk: int = PREFILL_CHUNK,
  cache_format: CacheFormat = CacheFormat.COMPUTE,
) -> GenerateResult:
  """Continues every prompt, all in one batch in which each row exits by itself.

  Args:
    model: the model.
    params: its parameters, stacked or (faster over many calls) prepared: see `prepare_params`, and
      `Placement.prepare_params` for a pipeline.
    prompts: token ids, at least one each.
    max_new_tokens: tokens to generate per prompt at most.
    policy: where tokens may leave the stack of layers.
    sampler: how tokens are chosen; one for all prompts or one each.
    stop_tokens: ids that end a row; the id itself is part of the result.
    seed: one seed per prompt, or one number n for the seeds n, n + 1, ...
    prefill_chunk: prompt tokens per row that are run at once.
    cache_format: how keys and values are kept.

  Raises:
    UserError: no or empty prompts, tokens outside the vocabulary, more tokens than the context
      holds, thresholds or settings out of range.
  """
  state, run = _start(
    model,
    params,
    prompts,
    max_new_tokens,
    policy,
    sampler,
    stop_tokens,
    seed,
    prefill_chunk,
    cache_format,
  )
  state = run(state, max_new_tokens * run.plan.placement.steps_per_token)
  return GenerateResult(completions_since(state, np.zeros(len(prompts), np.int32)))


def stream(
  model: ExitLM,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  max_new_tokens: int,
  policy: ExitPolicy = FullDepth(),
  sampler: Sampler | Sequence[Sampler] = Sampler(),
  stop_tokens: Sequence[int] = (),
  seed: int | Sequence[int] = 0,
  prefill_chunk: int = PREFILL_CHUNK,
  cache_format: CacheFormat = CacheFormat.COMPUTE,
  tokens_per_event: int = 1,
) -> Iterator[StreamEvent]:
  """Yields what `generate` returns, while it comes.

  An event comes every `tokens_per_event` steps: that many tokens per row, more if steps speculate,
  fewer in a pipeline whose tokens pass several stages. No event is empty.
  """
  if tokens_per_event < 1:
    raise UserError(f'tokens_per_event={tokens_per_event} must be at least 1')
  state, run = _start(
    model,
    params,
    prompts,
    max_new_tokens,
    policy,
    sampler,
    stop_tokens,
    seed,
    prefill_chunk,
    cache_format,
  )
  return _events(state, run, tokens_per_event)


def begin(
  model: ExitLM,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  policy: ExitPolicy,
  requests: Requests,
  max_new_tokens: int,
  prefill_chunk_size: int = PREFILL_CHUNK,
  cache_format: CacheFormat = CacheFormat.COMPUTE,
) -> DecodeState:
  """A state whose prompts are cached, ready for `run_steps`.

  Args:
    model: the model.
    params: parameters after `prepare_params`.
    prompts: token ids, at least one each.
    policy: the exit policy that the steps will use.
    requests: settings of each row; see `make_requests`.
    max_new_tokens: the largest budget; it sizes the cache.
    prefill_chunk_size: prompt tokens per row that are run at once.
    cache_format: how keys and values are kept.
  """
  config, plan = model.config, policy.plan(model.config)
  lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
  chunk, num_chunks = prefill_chunks(int(lengths.max()), prefill_chunk_size)
  # The last windows of lanes, padding included, must fit: prefill's, and those of the steps.
  longest = max(int(lengths.max()) + max_new_tokens + plan.overhang, num_chunks * chunk)
  tokens = np.zeros((len(prompts), round_up(longest, CAPACITY_STEP)), np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, : len(prompt)] = prompt
  state = init_state(
    config,
    plan,
    tokens=tokens,
    prompt_length=lengths,
    requests=requests,
    cache_format=cache_format,
  )
  return plan.placement.prefill(
    model,
    params,
    state,
    num_chunks=num_chunks,
    chunk=chunk,
    visibility=Causal(config.sliding_window),
  )


def make_requests(
  config: ModelConfig,
  *,
  policy: ExitPolicy,
  samplers: Sequence[Sampler],
  stop_tokens: Sequence[int],
  seeds: Sequence[int],
  budgets: Sequence[int],
) -> Requests:
  """Settings of rows as arrays; one sampler, seed and budget per row."""
  rows = len(samplers)
  stops = list(stop_tokens) or [NO_TOKEN]

  def column(name: str, dtype: Any) -> np.ndarray:
    return np.asarray([getattr(sampler, name) for sampler in samplers], dtype)

  return Requests(
    seed=np.asarray([seed & 0xFFFFFFFF for seed in seeds], np.uint32),
    temperature=column('temperature', np.float32),
    top_k=column('top_k', np.int32),
    top_p=column('top_p', np.float32),
    min_p=column('min_p', np.float32),
    stop_tokens=np.tile(np.asarray(stops, np.int32), (rows, 1)),
    budget=np.asarray(budgets, np.int32),
    thresholds=np.tile(np.asarray(policy.thresholds(config), np.float32), (rows, 1)),
  )


@dataclasses.dataclass(frozen=True)
class _Run:
  """`run_steps` with everything but the state bound."""

  model: ExitLM
  params: Params
  plan: StepPlan
  visibility: Causal

  def __call__(self, state: DecodeState, num_steps: int) -> DecodeState:
    return run_steps(
      self.model, self.params, state, num_steps, plan=self.plan, visibility=self.visibility
    )


def _start(
  model: ExitLM,
  params: Params,
  prompts: Sequence[Sequence[int]],
  max_new_tokens: int,
  policy: ExitPolicy,
  sampler: Sampler | Sequence[Sampler],
  stop_tokens: Sequence[int],
  seed: int | Sequence[int],
  chunk: int,
  cache_format: CacheFormat,
) -> tuple[DecodeState, _Run]:
  """A prefilled state, and what runs it."""
  config, rows = model.config, len(prompts)
  _check_prompts(config, prompts, max_new_tokens)
  check_params(params, policy.plan(config))
  if chunk < 1:
    raise UserError(f'prefill_chunk={chunk} must be at least 1')
  requests = make_requests(
    config,
    policy=policy,
    samplers=_per_row(
      'sampler', [sampler] * rows if isinstance(sampler, Sampler) else sampler, rows
    ),
    stop_tokens=stop_tokens,
    seeds=_seeds(seed, rows),
    budgets=[max_new_tokens] * rows,
  )
  params = policy.plan(config).placement.prepare_params(model, params)
  state = begin(
    model,
    params,
    prompts,
    policy=policy,
    requests=requests,
    max_new_tokens=max_new_tokens,
    prefill_chunk_size=chunk,
    cache_format=cache_format,
  )
  return state, _Run(model, params, policy.plan(config), Causal(config.sliding_window))


def _events(state: DecodeState, run: _Run, tokens_per_event: int) -> Iterator[StreamEvent]:
  seen = np.zeros(state.step.shape, np.int32)
  while not np.all(state.done):
    state = run(state, tokens_per_event)
    if np.array_equal(state.step, seen):
      continue  # Tokens are on their way through a pipeline.
    event = StreamEvent(completions_since(state, seen))
    seen = np.array(state.step)
    yield event


def _check_prompts(
  config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
  if max_new_tokens < 1:
    raise UserError(f'max_new_tokens={max_new_tokens} must be at least 1')
  if not prompts:
    raise UserError('no prompts: give at least one list of token ids')
  for row, prompt in enumerate(prompts):
    if not len(prompt):
      raise UserError(f'prompt {row} is empty: give at least one token')
    low, high = min(prompt), max(prompt)
    if low < 0 or high >= config.vocab_size:
      wrong = low if low < 0 else high
      raise UserError(
        f'prompt {row} has token {wrong}, outside the vocabulary of {config.vocab_size}: '
        'use the tokenizer that the model was trained with'
      )
    if len(prompt) + max_new_tokens > config.max_length:
      raise UserError(
        f'prompt of {len(prompt)} tokens plus max_new_tokens={max_new_tokens} exceeds the context '
        f'of {config.max_length}: shorten the prompt or ask for at most '
        f'{max(config.max_length - len(prompt), 0)} new tokens'
      )


def check_params(params: Params, plan: StepPlan) -> None:
  """Raises UserError if the plan reads parameters that are not there."""
  if plan.confidence is Confidence.CLASSIFIER and 'confidence' not in params:
    raise UserError(
      'confidence=classifier needs classifiers, one per exit, and this model has none: train them '
      'with `exitax tune-confidence`'
    )


def _per_row(name: str, values: Sequence[Any], rows: int) -> Sequence[Any]:
  if len(values) != rows:
    raise UserError(f'{len(values)} values of {name} for {rows} prompts: give one each, or one')
  return values


def _seeds(seed: int | Sequence[int], rows: int) -> Sequence[int]:
  """One seed per row; a single one counts up."""
  try:
    if np.ndim(seed):
      return _per_row('seed', [operator.index(item) for item in seed], rows)  # type: ignore
    first = operator.index(seed)  # type: ignore[arg-type]
  except TypeError:
    raise UserError(f'seed={seed!r} is no whole number: give one, or one per prompt') from None
  return range(first, first + rows)


def prefill_chunks(longest: int, largest_chunk: int) -> tuple[int, int]:
  """Tokens of a chunk, and how many chunks prompts of up to `longest` tokens take; the last is not prefilled."""
  prefilled = longest - 1
  chunk = min(largest_chunk, 1 << max(prefilled - 1, 0).bit_length())
  return chunk, -(-prefilled // chunk)


def round_up(number: int, multiple: int) -> int:
  """The least multiple that is no less."""
  return -(-number // multiple) * multiple
