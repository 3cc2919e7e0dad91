"""Server-sent events, and noticing that the client has gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from exitax.serve.refusals import Refusal

DONE = 'data: [DONE]\n\n'

Result = TypeVar('Result')


class ClientGone(Exception):
  """Nobody is there to answer to."""


def event(data: Mapping[str, Any]) -> str:
  """One event with a JSON object."""
  return f'data: {json.dumps(data, separators=(",", ":"))}\n\n'


async def unless_gone(receive: Receive, act: Awaitable[Result]) -> Result:
  """Awaits `act`, and cancels it when the client disconnects.

  Raises:
    ClientGone: it did.
  """
  work = asyncio.ensure_future(act)
  watch = asyncio.ensure_future(_disconnected(receive))
  try:
    await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
      raise ClientGone
    return work.result()
  finally:
    for task in (work, watch):
      task.cancel()
    await asyncio.gather(work, watch, return_exceptions=True)


class EventStream(Response):
  """Sends events as they come; ends the source when the client goes away.

  The first event is awaited before the status is sent, so that a refusal has a status of its own;
  a later one is an event with the error's body.
  """

  media_type = 'text/event-stream'

  def __init__(self, events: AsyncIterator[str], *, close: Callable[[], None]) -> None:
    """Answers with `events`; `close` is called when the answer has ended, however it ended."""
    self._events, self._close = events, close
    self.status_code = 200
    self.background = None
    self.init_headers({'cache-control': 'no-cache', 'x-accel-buffering': 'no'})

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers."""
    try:
      with contextlib.suppress(ClientGone):
        await unless_gone(receive, self._send(scope, receive, send))
    finally:
      self._close()

  async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
    started = False
    try:
      async for text in self._events:
        if not started:
          started = True
          await send({'type': 'http.response.start', 'status': 200, 'headers': self.raw_headers})
        await send({'type': 'http.response.body', 'body': text.encode(), 'more_body': True})
    except Refusal as refusal:
      if not started:
        await refusal_response(refusal)(scope, receive, send)
        return
      await send(
        {
          'type': 'http.response.body',
          'body': (event(refusal.body()) + DONE).encode(),
          'more_body': True,
        }
      )
    await send({'type': 'http.response.body', 'body': b''})


def refusal_response(refusal: Refusal) -> JSONResponse:
  """A refusal as an answer."""
  wait = refusal.retry_after
  headers = {} if wait is None else {'retry-after': str(wait)}
  if refusal.status == 401:
    headers['www-authenticate'] = 'Bearer'
  return JSONResponse(refusal.body(), status_code=refusal.status, headers=headers)


async def _disconnected(receive: Receive) -> None:
  while (await receive())['type'] != 'http.disconnect':
    pass
