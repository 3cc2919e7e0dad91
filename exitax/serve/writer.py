"""From gains in tokens to pieces of text: one writer per choice of an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from exitax.data import StreamDecoder, Tokenizer
from exitax.decode import StopReason
from exitax.serve.jobs import Gain
from exitax.serve.stops import Piece, StopScanner

STOP = 'stop'
LENGTH = 'length'


@dataclasses.dataclass(kw_only=True)
class Written:
  """What a gain adds to a choice.

  Attributes:
    pieces: tokens whose text is sure.
    finish_reason: 'stop' or 'length' at the end, else None.
  """

  pieces: list[Piece]
  finish_reason: str | None = None


class ChoiceWriter:
  """Decodes the tokens of one choice and looks for its stop strings.

  Attributes:
    num_tokens: tokens generated so far, a stop token and those of a stop string included.
    layers_run: layers run for all of them.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
    """Starts an empty text."""
    self._decoder = StreamDecoder(tokenizer)
    self._scanner = StopScanner(stops)
    self.num_tokens = 0
    self.layers_run = 0

  def write(self, gain: Gain) -> Written:
    """The text of a gain; after a stop string no more gains are expected."""
    written = Written(pieces=[])
    ended = gain.stop_reason is not StopReason.RUNNING
    for number, token in enumerate(gain.tokens, start=1):
      self.num_tokens += 1
      self.layers_run += token.exit_layer
      last = ended and number == len(gain.tokens)
      if last and gain.stop_reason is StopReason.STOP_TOKEN:
        break  # It ends the text without being part of it.
      text = self._decoder.push(token.token)
      if last:
        text += self._decoder.finish()
      written.pieces += self._scanner.push(Piece(text, token))
      if self._scanner.stopped:
        written.finish_reason = STOP
        return written
    if ended:
      written.pieces += self._scanner.finish()
      stopped = gain.stop_reason is StopReason.STOP_TOKEN
      written.finish_reason = STOP if stopped else LENGTH
    return written
