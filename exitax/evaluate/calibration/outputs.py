"""What a model makes of the same prompts at every threshold: decoded, or worked out from a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from exitax.data import Batch, Progress, quiet
from exitax.decode import (
  Completion,
  Confidence,
  ExitPolicy,
  Strategy,
  StrategySettings,
  generate,
  prepare_params,
)
from exitax.evaluate.token_table import TokenTable, token_table
from exitax.models import ExitLM, Params
from exitax.parallel import ShardingRules

_LENGTH_STEP = 64


class Decoder:
  """Greedy continuations of the same prompts at one threshold after another.

  Thresholds are data: all are decoded by one compiled program, full depth (threshold 1) included, so
  that numbers which round differently in another program cannot look like a change of text. Prompts of
  like length share a batch, and the last batch is filled up with copies.
  """

  def __init__(
    self,
    model: ExitLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    measure: Confidence,
    strategy: Strategy,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    batch_size: int,
  ) -> None:
    """Keeps a copy of the parameters in the layout of decoding.

    Args:
      model: the model.
      params: its parameters.
      prompts: token ids.
      measure: of confidence.
      strategy: how skipped layers are filled.
      max_new_tokens: tokens per prompt at most.
      stop_tokens: ids that end a row.
      batch_size: rows at once.
    """
    self._model, self._prompts = model, prompts
    self._params = prepare_params(model, params)
    self._measure, self._strategy = measure, strategy
    self._max_new_tokens, self._stop_tokens = max_new_tokens, stop_tokens
    size = min(batch_size, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    self.batches = [order[i : i + size] for i in range(0, len(order), size)]
    self._size = size

  def __call__(self, threshold: float, *, progress: Progress = quiet) -> list[Completion]:
    """One completion per prompt; `progress` wraps the batches."""
    found: dict[int, Completion] = {}
    shown = progress(
      self.batches,
      total=len(self.batches),
      label=f'decoding {len(self._prompts)} prompts at threshold {threshold:g}',
    )
    for batch in shown:
      found.update(zip(batch, self._decode(batch, self._policy(threshold)), strict=False))
    return [found[i] for i in range(len(self._prompts))]

  def _policy(self, threshold: float) -> ExitPolicy:
    settings = StrategySettings(
      strategy=self._strategy, threshold=threshold, confidence=self._measure
    )
    return settings.policy(self._model.config)

  def _decode(self, batch: Sequence[int], policy: ExitPolicy) -> tuple[Completion, ...]:
    rows = [*batch, *[batch[-1]] * (self._size - len(batch))]
    result = generate(
      self._model,
      self._params,
      [self._prompts[i] for i in rows],
      max_new_tokens=self._max_new_tokens,
      policy=policy,
      stop_tokens=self._stop_tokens,
    )
    return result.completions


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
