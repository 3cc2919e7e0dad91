"""Text out of a stream of token ids, never half a character."""

from __future__ import annotations

from exitax.data.tokenizers import Tokenizer

_BROKEN = '\ufffd'


class StreamDecoder:
  """Decodes ids one at a time; what `push` and `finish` return, joined, is `decode` of them all.

  A token that ends inside a UTF-8 character is held back until the character is whole. Each piece
  is decoded together with the one before it, since some tokenizers drop a leading space.

  Miniature, with bytes: pushing 99, 195, 169 (the text `cé`) returns `c`, then nothing, then `é`.
  """

  def __init__(self, tokenizer: Tokenizer) -> None:
    """Starts an empty stream."""
    self._tokenizer = tokenizer
    self._shown: list[int] = []  # The last piece that was returned: context only.
    self._held: list[int] = []

  def push(self, token_id: int) -> str:
    """The text that `token_id` completes; empty while a character is unfinished."""
    self._held.append(int(token_id))
    text = self._new_text()
    if not text or text.endswith(_BROKEN):
      return ''
    self._shown, self._held = self._held, []
    return text

  def finish(self) -> str:
    """What is still held back, broken characters as U+FFFD; the stream starts anew."""
    text = self._new_text()
    self._shown, self._held = [], []
    return text

  def _new_text(self) -> str:
    before = self._tokenizer.decode(self._shown)
    return self._tokenizer.decode(self._shown + self._held)[len(before) :]
