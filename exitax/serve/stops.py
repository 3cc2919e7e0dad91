"""Stop strings: found across the borders of tokens, never shown, not even in part."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from exitax.serve.jobs import Token


@dataclasses.dataclass(frozen=True)
class Piece:
  """One token of an answer.

  Attributes:
    text: what it adds to the text; empty while a character is unfinished.
    token: how it was chosen.
  """

  text: str
  token: Token


class StopScanner:
  """Passes pieces on as soon as they cannot be part of a stop string any more.

  Miniature, stop string 'END': pushing 'a', ' E', 'N' passes on 'a', nothing, nothing; then 'X'
  passes on ' E', 'N', 'X', while 'D.' would pass on ' ' (cut short) and stop.
  """

  def __init__(self, stops: Sequence[str]) -> None:
    """Starts a text; an empty `stops` passes everything on."""
    self._stops = tuple(stop for stop in stops if stop)
    self._held: list[Piece] = []
    self.stopped = False

  def push(self, piece: Piece) -> list[Piece]:
    """The pieces that are now sure; nothing after a stop string was found."""
    if self.stopped:
      return []
    self._held.append(piece)
    text = ''.join(held.text for held in self._held)
    found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      self.stopped = True
      return self._release(min(found), cut=True)
    return self._release(len(text) - self._possible_start(text), cut=False)

  def finish(self) -> list[Piece]:
    """The pieces that were held back, at the end of a text that no stop string ended."""
    held, self._held = self._held, []
    return [] if self.stopped else held

  def _possible_start(self, text: str) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    return max(
      (
        size
        for stop in self._stops
        for size in range(1, min(len(stop), len(text) + 1))
        if text.endswith(stop[:size])
      ),
      default=0,
    )

  def _release(self, end: int, *, cut: bool) -> list[Piece]:
    """Takes the pieces before `end` out; one that reaches beyond it is cut, or stays held."""
    released, start = [], 0
    while self._held:
      piece = self._held[0]
      stop = start + len(piece.text)
      if stop > end or (cut and start >= end):
        if cut and start < end:
          released.append(dataclasses.replace(piece, text=piece.text[: end - start]))
        break
      released.append(self._held.pop(0))
      start = stop
    return released
