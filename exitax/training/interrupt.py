"""Being told to stop: SIGTERM and Ctrl-C become a flag that the loop reads between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
  """While entered, the first SIGTERM or SIGINT sets `requested`; a second one acts as usual.

  Outside the main thread (a notebook's executor) signals cannot be caught; nothing is changed then.
  """

  def __init__(self) -> None:
    self.requested = False
    self._previous: dict[int, object] = {}

  def __enter__(self) -> StopSignal:
    if threading.current_thread() is threading.main_thread():
      self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._restore()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self.requested = True
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
    self._previous = {}
