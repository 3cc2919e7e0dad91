"""What a model makes of the same prompts at every threshold: decoded, or worked out from a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from exitax.data import Batch, Progress, quiet
from exitax.decode import (
  Causal,
  Completion,
  Confidence,
  DeferredExit,
  ExitPolicy,
  Sampler,
  begin,
  completions_since,
  make_requests,
  prepare_params,
  run_steps,
)
from exitax.errors import UserError
from exitax.evaluate.token_table import TokenTable, token_table
from exitax.models import ExitLM, Params
from exitax.parallel import ShardingRules

_POLICIES = {'deferred': DeferredExit}
_LENGTH_STEP = 64


def strategy_policy(strategy: str, *, threshold: float, measure: Confidence) -> ExitPolicy:
  """The policy that a strategy's name stands for.

  Raises:
    UserError: none, or one that has no thresholds.
  """
  if strategy == 'speculative':
    raise UserError('strategy=speculative gives the tokens of full depth: nothing to certify')
  if strategy not in _POLICIES:
    raise UserError(f'strategy={strategy!r} is not known: choose {", ".join(_POLICIES)}')
  return _POLICIES[strategy](threshold=threshold, confidence=measure)


def decode_outputs(
  model: ExitLM,
  params: Params,
  prompts: Sequence[Sequence[int]],
  *,
  thresholds: Sequence[float],
  measure: Confidence,
  strategy: str,
  max_new_tokens: int,
  stop_tokens: Sequence[int],
  batch_size: int,
  progress: Progress = quiet,
) -> list[list[Completion]]:
  """Greedy continuations, `[thresholds][prompts]`.

  Thresholds are data: every batch is prefilled once and its state copied for each of them, so all are
  decoded by one compiled program, full depth (threshold 1) included. Prompts of like length share a
  batch; the last batch is filled up with copies.

  Args:
    model: the model.
    params: its parameters.
    prompts: token ids.
    thresholds: in [0, 1].
    measure: of confidence.
    strategy: how skipped layers are filled.
    max_new_tokens: tokens per prompt at most.
    stop_tokens: ids that end a row.
    batch_size: rows at once.
    progress: wraps batches times thresholds.
  """
  policy = strategy_policy(strategy, threshold=1.0, measure=measure)
  plan = policy.plan(model.config)
  params = prepare_params(model, params)
  batch_size = min(batch_size, len(prompts))
  order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
  batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
  visibility = Causal(model.config.sliding_window)
  found: list[list[Completion | None]] = [[None] * len(prompts) for _ in thresholds]
  ticks = iter(
    progress(
      range(len(batches) * len(thresholds)),
      total=len(batches) * len(thresholds),
      label=f'decoding {len(prompts)} prompts at {len(thresholds)} thresholds',
    )
  )
  for batch in batches:
    rows = [*batch, *[batch[-1]] * (batch_size - len(batch))]
    requests = make_requests(
      model.config,
      policy=policy,
      samplers=[Sampler()] * batch_size,
      stop_tokens=stop_tokens,
      seeds=[0] * batch_size,
      budgets=[max_new_tokens] * batch_size,
    )
    start = begin(
      model,
      params,
      [prompts[i] for i in rows],
      policy=policy,
      requests=requests,
      max_new_tokens=max_new_tokens,
    )
    for index, threshold in enumerate(thresholds):
      next(ticks)
      state = jax.tree.map(jnp.copy, start)
      limits = jnp.full_like(state.requests.thresholds, threshold)
      state = dataclasses.replace(
        state, requests=dataclasses.replace(state.requests, thresholds=limits)
      )
      state = run_steps(model, params, state, max_new_tokens, plan=plan, visibility=visibility)
      completions = completions_since(state, np.zeros(batch_size, np.int32))
      for place, completion in zip(batch, completions, strict=False):
        found[index][place] = completion
  for _ in ticks:  # Lets a bar end.
    pass
  return [[item for item in row if item is not None] for row in found]


def text_tables(
  model: ExitLM,
  params: Params,
  texts: Sequence[Sequence[int]],
  *,
  skip: Sequence[int],
  measure: Confidence,
  mesh: Mesh,
  rules: ShardingRules,
  batch_size: int,
  chunk_length: int = 64,
  progress: Progress = quiet,
) -> list[TokenTable]:
  """What every exit says of every token of each text, teacher-forced; one table per text.

  Args:
    model: the model.
    params: parameters with stacked blocks, on the mesh.
    texts: token ids, at least two each.
    skip: for each text, how many of its first tokens are given and not scored (at least 1).
    measure: of confidence.
    mesh: where the work is done.
    rules: how batches are spread over it.
    batch_size: texts at once.
    chunk_length: positions of each text whose logits live at once.
    progress: wraps the batches.
  """
  batch_size = min(batch_size, len(texts))
  longest = max(map(len, texts)) - 1
  length = max(longest, min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, model.config.max_length))
  count = -(-len(texts) // batch_size)
  table = token_table(
    model,
    params,
    progress(
      _batches(texts, skip, length=length, batch_size=batch_size),
      total=count,
      label=f'scoring {len(texts)} texts',
    ),
    measures={measure.value: measure},
    chunk_length=chunk_length,
    mesh=mesh,
    rules=rules,
  )
  sizes = [len(text) - first for text, first in zip(texts, skip, strict=True)]
  ends = np.cumsum(sizes)
  return [
    TokenTable(
      nll=table.nll[:, begin:end],
      correct=table.correct[:, begin:end],
      agrees=table.agrees[:, begin:end],
      confidence={name: values[:, begin:end] for name, values in table.confidence.items()},
    )
    for begin, end in zip(ends - sizes, ends, strict=True)
  ]


def _batches(
  texts: Sequence[Sequence[int]], skip: Sequence[int], *, length: int, batch_size: int
) -> Iterator[Batch]:
  """Rows of one text each; a last batch is filled up with rows that count nothing."""
  for first in range(0, len(texts), batch_size):
    shape = (batch_size, length)
    batch = Batch(
      tokens=np.zeros(shape, np.int32),
      targets=np.zeros(shape, np.int32),
      segment_ids=np.zeros(shape, np.int32),
      positions=np.tile(np.arange(length, dtype=np.int32), (batch_size, 1)),
      weights=np.zeros(shape, np.float32),
    )
    for row, text in enumerate(texts[first : first + batch_size]):
      count = len(text) - 1
      batch.tokens[row, :count] = text[:-1]
      batch.targets[row, :count] = text[1:]
      batch.segment_ids[row, :count] = 1
      batch.weights[row, skip[first + row] - 1 : count] = 1.0
    yield batch
