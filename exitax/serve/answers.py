"""OpenAI's answers as JSON objects, with the depth and confidence of every token."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from exitax.data import Tokenizer
from exitax.serve.logprobs import chat_logprobs, completion_logprobs
from exitax.serve.stops import Piece
from exitax.serve.writer import ChoiceWriter


class AnswerShape:
  """One answer on its way out: a completion or a chat completion, whole or in parts."""

  def __init__(
    self,
    *,
    model: str,
    chat: bool,
    tokenizer: Tokenizer,
    num_top: int | None = None,
    thinkers: Sequence[int | None] | None = None,
  ) -> None:
    """Starts an answer: its id and its time.

    Args:
      model: name of the model.
      chat: which of the two.
      tokenizer: names tokens where log-probabilities are shown.
      num_top: alternatives per token; None shows no log-probabilities.
      thinkers: who writes each choice, told with it; None tells nothing.
    """
    self._thinkers = thinkers
    self._chat, self._tokenizer, self._num_top = chat, tokenizer, num_top
    self._offsets: dict[int, int] = {}
    self._id = f'{"chatcmpl" if chat else "cmpl"}-{uuid.uuid4().hex}'
    self._created = int(time.time())
    self._model = model

  def whole(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    kind = 'chat.completion' if self._chat else 'text_completion'
    return {**self._head(kind), 'choices': list(choices), 'usage': usage}

  def chunk(
    self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None
  ) -> dict[str, Any]:
    """One event of a stream."""
    kind = 'chat.completion.chunk' if self._chat else 'text_completion'
    return {**self._head(kind), 'choices': list(choices), 'usage': usage}

  def choice(
    self, index: int, pieces: Sequence[Piece], finish_reason: str | None, *, before: str = ''
  ) -> dict[str, Any]:
    """One finished choice; `before` comes before its text."""
    self._offsets[index] = len(before)
    text = before + ''.join(piece.text for piece in pieces)
    content: dict[str, Any] = {'text': text}
    if self._chat:
      content = {'message': {'role': 'assistant', 'content': text, 'refusal': None}}
    return self._choice(index, content, pieces, finish_reason)

  def opening(self, index: int, *, before: str = '') -> dict[str, Any] | None:
    """A stream's first part of a choice; None where it has none."""
    self._offsets[index] = len(before)
    if self._chat:
      return self._choice(index, {'delta': {'role': 'assistant', 'content': ''}}, (), None)
    return self._choice(index, {'text': before}, (), None) if before else None

  def delta(self, index: int, pieces: Sequence[Piece], finish_reason: str | None) -> dict[str, Any]:
    """A further part of a choice."""
    text = ''.join(piece.text for piece in pieces)
    content: dict[str, Any] = {'text': text}
    if self._chat:
      content = {'delta': {'content': text} if text else {}}
    return self._choice(index, content, pieces, finish_reason)

  def _head(self, kind: str) -> dict[str, Any]:
    return {'id': self._id, 'object': kind, 'created': self._created, 'model': self._model}

  def _choice(
    self,
    index: int,
    content: dict[str, Any],
    pieces: Sequence[Piece],
    finish_reason: str | None,
  ) -> dict[str, Any]:
    return {
      'index': index,
      **({} if self._thinkers is None else {'thinker': self._thinkers[index]}),
      **content,
      'logprobs': self._logprobs(index, pieces),
      'finish_reason': finish_reason,
      'pieces': [piece.text for piece in pieces],
      'exit_layers': [piece.token.exit_layer for piece in pieces],
      'confidences': [round(piece.token.confidence, 4) for piece in pieces],
    }

  def _logprobs(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any] | None:
    if self._num_top is None or not pieces:
      return None
    if self._chat:
      return chat_logprobs(pieces, self._tokenizer)
    offset = self._offsets[index]
    self._offsets[index] += sum(len(piece.text) for piece in pieces)
    return completion_logprobs(pieces, self._tokenizer, num_top=self._num_top, offset=offset)


def usage_of(
  writers: Sequence[ChoiceWriter], *, prompt_tokens: int, cached_tokens: int
) -> dict[str, Any]:
  """Tokens of an answer, and the mean number of layers run for those generated."""
  generated = sum(writer.num_tokens for writer in writers)
  layers = sum(writer.layers_run for writer in writers)
  return {
    'prompt_tokens': prompt_tokens,
    'completion_tokens': generated,
    'total_tokens': prompt_tokens + generated,
    'prompt_tokens_details': {'cached_tokens': cached_tokens},
    'effective_layers': round(layers / generated, 4) if generated else None,
  }
