"""A request while the engine works on it: events of the engine's thread become text, one by one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from exitax.decode import StopReason
from exitax.serve.answers import AnswerShape, usage_of
from exitax.serve.jobs import Event, Failure
from exitax.serve.service import Service, Work
from exitax.serve.sse import DONE, event
from exitax.serve.stops import Piece
from exitax.serve.writer import ChoiceWriter, Written


class Running:
  """Submitted work. Whoever makes one must iterate it or `close` it."""

  def __init__(self, service: Service, work: Work) -> None:
    """Submits.

    Raises:
      Refusal: 429 or 503.
    """
    self._work, self._metrics = work, service.metrics
    self._events: asyncio.Queue[Event] = asyncio.Queue()
    self._writers = [ChoiceWriter(service.tokenizer, work.stops) for _ in work.echoes]
    self._cached: dict[int, int] = {}
    loop = asyncio.get_running_loop()

    def deliver(happened: Event) -> None:
      with contextlib.suppress(RuntimeError):  # The loop has ended: nobody listens.
        loop.call_soon_threadsafe(self._events.put_nowait, happened)

    self._unfinished = set(range(len(self._writers)))
    self._ticket = service.engine.submit(work.jobs, deliver)

  async def written(self) -> AsyncIterator[tuple[int, Written]]:
    """Yields what each choice gains until all have ended.

    Raises:
      Refusal: the engine gave the request up.
    """
    try:
      while self._unfinished:
        happened = await self._events.get()
        if isinstance(happened, Failure):
          self._unfinished.clear()
          raise happened.refusal
        choice = happened.choice
        if choice not in self._unfinished:
          continue  # Came between a stop string and the engine's notice of it.
        self._cached[choice] = happened.cached_tokens
        written = self._writers[choice].write(happened)
        if written.finish_reason:
          self._unfinished.discard(choice)
          if happened.stop_reason is StopReason.RUNNING:
            self._ticket.stop(choice)
        yield choice, written
    finally:
      self.close()

  def close(self) -> None:
    """Frees what the request holds; called in any case."""
    if self._unfinished and not self._ticket.cancelled:
      self._metrics.cancelled.inc()
    self._ticket.cancel()

  def usage(self) -> dict[str, Any]:
    """Tokens so far."""
    cached = (self._cached.get(job.first_choice, 0) for job in self._work.jobs)
    return usage_of(
      self._writers, prompt_tokens=self._work.prompt_tokens, cached_tokens=sum(cached)
    )


async def whole_answer(running: Running, work: Work, shape: AnswerShape) -> dict[str, Any]:
  """Waits for all choices."""
  pieces: list[list[Piece]] = [[] for _ in work.echoes]
  reasons: list[str | None] = [None] * len(pieces)
  async for choice, written in running.written():
    pieces[choice] += written.pieces
    reasons[choice] = written.finish_reason
  choices = [
    shape.choice(i, pieces[i], reasons[i], before=echo) for i, echo in enumerate(work.echoes)
  ]
  return shape.whole(choices, running.usage())


async def streamed_answer(
  running: Running, work: Work, shape: AnswerShape, *, include_usage: bool
) -> AsyncIterator[str]:
  """Yields server-sent events."""
  opened: set[int] = set()
  async for choice, written in running.written():
    if choice not in opened:
      opened.add(choice)
      opening = shape.opening(choice, before=work.echoes[choice])
      if opening:
        yield event(shape.chunk([opening]))
    if written.pieces or written.finish_reason:
      part = shape.delta(choice, written.pieces, written.finish_reason)
      yield event(shape.chunk([part]))
  if include_usage:
    yield event(shape.chunk([], running.usage()))
  yield DONE
