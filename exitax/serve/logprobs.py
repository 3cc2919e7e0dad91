"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exitax.data import Tokenizer
from exitax.serve.stops import Piece

_LOWEST = -9999.0  # JSON has no infinity.


def completion_logprobs(
  pieces: Sequence[Piece], tokenizer: Tokenizer, *, num_top: int, offset: int
) -> dict[str, Any]:
  """`logprobs` of a completion's choice; `offset` is where the first piece begins in the text."""
  offsets = []
  for piece in pieces:
    offsets.append(offset)
    offset += len(piece.text)
  tops = [_by_text(piece, tokenizer) for piece in pieces] if num_top else None
  return {
    'tokens': [_text(piece.token.token, tokenizer) for piece in pieces],
    'token_logprobs': [_finite(piece.token.log_prob) for piece in pieces],
    'top_logprobs': tops,
    'text_offset': offsets,
  }


def chat_logprobs(pieces: Sequence[Piece], tokenizer: Tokenizer) -> dict[str, Any]:
  """`logprobs` of a chat's choice."""
  content = [
    {
      **_chat_token(piece.token.token, piece.token.log_prob, tokenizer),
      'top_logprobs': [_chat_token(token, value, tokenizer) for token, value in piece.token.top],
    }
    for piece in pieces
  ]
  return {'content': content, 'refusal': None}


def _by_text(piece: Piece, tokenizer: Tokenizer) -> dict[str, float]:
  """Alternatives by their text; of those that read the same, the best."""
  found: dict[str, float] = {}
  for token, value in piece.token.top:
    found.setdefault(_text(token, tokenizer), _finite(value))
  return found


def _chat_token(token: int, log_prob: float, tokenizer: Tokenizer) -> dict[str, Any]:
  text = _text(token, tokenizer)
  return {'token': text, 'logprob': _finite(log_prob), 'bytes': list(text.encode())}


def _text(token: int, tokenizer: Tokenizer) -> str:
  return tokenizer.decode([token])


def _finite(log_prob: float) -> float:
  return round(max(log_prob, _LOWEST), 6)
