"""What every exit says of given texts, worked out once for all rows of a table."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from exitax.checkpoint import LoadedModel
from exitax.data import Progress, quiet
from exitax.decode import Confidence
from exitax.errors import UserError
from exitax.evaluate.calibration.outputs import text_tables
from exitax.evaluate.harness.rows import Row
from exitax.evaluate.token_table import TokenTable
from exitax.models import ExitLM, ModelConfig
from exitax.parallel import ShardingRules

# Shorter texts share one program.
_SHORTEST = 64


@dataclasses.dataclass(frozen=True)
class ScoredText:
  """A text whose end is scored.

  Attributes:
    tokens: ids, at least one more than are scored.
    num_scored: how many of the last ones are scored, at least 1.
  """

  tokens: tuple[int, ...]
  num_scored: int

  @property
  def key(self) -> bytes:
    """Names the text, in 32 bytes."""
    content = np.asarray([self.num_scored, *self.tokens], np.int32).tobytes()
    return hashlib.sha256(content).digest()


class Scorer:
  """Token tables of texts, one teacher-forced pass for all exits that some row needs.

  Texts are put into buckets of like length, so that few programs are compiled and little is padding.
  Tables are kept: the second row that asks for a text gets the first one's.
  """

  def __init__(
    self,
    loaded: LoadedModel,
    rows: Sequence[Row],
    *,
    mesh: Mesh,
    rules: ShardingRules,
    batch_size: int,
    measure: Confidence = Confidence.MAX_PROB,
    progress: Progress = quiet,
  ) -> None:
    """Takes a model.

    Args:
      loaded: the model.
      rows: all that will ask; exits that none of them reads are not scored.
      mesh: where the work is done.
      rules: how batches are spread over it.
      batch_size: texts at once.
      measure: of confidence.
      progress: wraps the batches.
    """
    self._model = _with_exits_of(loaded.model, rows)
    self._params = loaded.params
    self._mesh, self._rules = mesh, rules
    self._batch_size, self._measure, self._progress = batch_size, measure, progress
    self._tables: dict[bytes, TokenTable] = {}

  @property
  def depths(self) -> tuple[int, ...]:
    """Layers before each row of a table, the final layer last."""
    return self._model.config.depths

  def fit(self, context: Sequence[int], continuation: Sequence[int]) -> ScoredText:
    """A text that fits the model: too much is cut off the context's beginning.

    The last token is predicted and never read, so that one more fits than the context holds.

    Raises:
      UserError: the continuation alone does not fit.
    """
    longest = self._model.config.max_length
    if len(continuation) > longest:
      raise UserError(
        f'a continuation of {len(continuation)} tokens exceeds the context of {longest}: take a '
        'task with shorter ones, or a model with a longer context'
      )
    tokens = (*context, *continuation)[-(longest + 1) :]
    return ScoredText(tokens=tokens, num_scored=len(continuation))

  def __call__(self, texts: Sequence[ScoredText]) -> list[TokenTable]:
    """One table per text, of its scored tokens."""
    missing = {key: text for text in texts if (key := text.key) not in self._tables}
    buckets: dict[int, list[tuple[bytes, ScoredText]]] = {}
    for key, text in missing.items():
      length = bucket_length(self._model.config, len(text.tokens) - 1)
      buckets.setdefault(length, []).append((key, text))
    # Long ones first: what does not fit the memory fails at once.
    for _, members in sorted(buckets.items(), reverse=True):
      keys, members_texts = zip(*members, strict=True)
      self._tables |= zip(keys, self._score(members_texts), strict=True)
    return [self._tables[text.key] for text in texts]

  def _score(self, texts: Sequence[ScoredText]) -> list[TokenTable]:
    return text_tables(
      self._model,
      self._params,
      [text.tokens for text in texts],
      skip=[len(text.tokens) - text.num_scored for text in texts],
      measure=self._measure,
      mesh=self._mesh,
      rules=self._rules,
      batch_size=self._batch_size,
      progress=self._progress,
    )


def bucket_length(config: ModelConfig, num_tokens: int) -> int:
  """The shortest bucket that holds so many tokens: 64, 128, ... and the whole context."""
  return min(max(_SHORTEST, 1 << (num_tokens - 1).bit_length()), config.max_length)


def _with_exits_of(model: ExitLM, rows: Sequence[Row]) -> ExitLM:
  """The same model, of whose exits only those that some row reads are left."""
  if any(row.layers is None for row in rows):
    return model
  wanted = {layer for row in rows for layer in row.layers or ()}
  exits = tuple(item for item in model.config.exits if item.layer in wanted)
  return ExitLM(dataclasses.replace(model.config, exits=exits))
