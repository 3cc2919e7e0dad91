"""OpenAI's answers as JSON objects, with the depth and confidence of every token."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from exitax.serve.stops import Piece
from exitax.serve.writer import ChoiceWriter


class AnswerShape:
  """What makes an answer a completion or a chat completion.

  Attributes:
    model: name of the model.
    chat: which of the two.
  """

  def __init__(self, *, model: str, chat: bool) -> None:
    """Starts an answer: its id and its time."""
    self._chat = chat
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
    text = before + ''.join(piece.text for piece in pieces)
    content: dict[str, Any] = {'text': text}
    if self._chat:
      content = {'message': {'role': 'assistant', 'content': text, 'refusal': None}}
    return self._choice(index, content, pieces, finish_reason)

  def opening(self, index: int, *, before: str = '') -> dict[str, Any] | None:
    """A stream's first part of a choice; None where it has none."""
    if self._chat:
      return self._choice(index, {'delta': {'role': 'assistant', 'content': ''}}, (), None)
    return self._choice(index, {'text': before}, (), None) if before else None

  def delta(
    self, index: int, pieces: Sequence[Piece], finish_reason: str | None
  ) -> dict[str, Any]:
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
      **content,
      'logprobs': None,
      'finish_reason': finish_reason,
      'pieces': [piece.text for piece in pieces],
      'exit_layers': [piece.exit_layer for piece in pieces],
      'confidences': [round(piece.confidence, 4) for piece in pieces],
    }


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
