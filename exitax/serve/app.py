"""The HTTP side: OpenAI's endpoints, health, metrics and the page."""

from __future__ import annotations

import asyncio
import importlib.resources
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from exitax.serve.answers import AnswerShape
from exitax.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, parse_request
from exitax.serve.refusals import Refusal
from exitax.serve.running import Running, streamed_answer, whole_answer
from exitax.serve.security import check_host, check_key
from exitax.serve.service import Service, Work
from exitax.serve.sse import ClientGone, EventStream, refusal_response, unless_gone

MAX_BODY_BYTES = 4 << 20
# Longer bodies are turned into tokens beside the event loop.
_LONG_BODY = 16 << 10
_PAGE = {'/': 'index.html', '/page.css': 'page.css', '/page.js': 'page.js'}
_MEDIA_TYPES = {'html': 'text/html', 'css': 'text/css', 'js': 'text/javascript'}
_PAGE_HEADERS = {
  'content-security-policy': "default-src 'self'; img-src data:; frame-ancestors 'none'",
  'x-content-type-options': 'nosniff',
  'referrer-policy': 'no-referrer',
}


def create_app(service: Service, *, host: str, api_key: str | None) -> FastAPI:
  """The application.

  Args:
    service: what answers.
    host: address that the server is bound to.
    api_key: what clients must send; None asks for nothing.
  """
  app = FastAPI(title='exitax', docs_url=None, redoc_url=None, openapi_url=None)
  created = int(time.time())

  async def from_here(request: Request) -> None:
    check_host(request.headers.get('host'), bound_to=host)

  async def with_key(request: Request) -> None:
    check_key(request.headers.get('authorization'), api_key=api_key)

  local, private = [Depends(from_here)], [Depends(from_here), Depends(with_key)]

  @app.post('/v1/completions', dependencies=private)
  async def completions(request: Request) -> Response:
    return await _answer(service, request, CompletionRequest, service.completion)

  @app.post('/v1/chat/completions', dependencies=private)
  async def chat_completions(request: Request) -> Response:
    return await _answer(service, request, ChatRequest, service.chat)

  @app.get('/v1/models', dependencies=private)
  async def models() -> dict[str, Any]:
    return {'object': 'list', 'data': [_model_card(service, created)]}

  @app.get('/v1/models/{name}', dependencies=private)
  async def model(name: str) -> dict[str, Any]:
    if name != service.name:
      raise Refusal(404, f'no model {name[:80]!r} here', param='model', code='model_not_found')
    return _model_card(service, created)

  @app.get('/metrics', dependencies=private)
  async def metrics() -> Response:
    text = service.metrics.render(service.engine.occupancy())
    return Response(text, media_type='text/plain; version=0.0.4')

  @app.get('/health', dependencies=local)
  async def health() -> Response:
    draining = service.engine.draining
    status = {'status': 'draining' if draining else 'ok', 'model': service.name}
    return JSONResponse(status, status_code=503 if draining else 200)

  for path, file in _PAGE.items():
    app.get(path, dependencies=local)(_page(file))
  app.exception_handler(Refusal)(_refuse)
  app.exception_handler(HTTPException)(_refuse_route)
  app.exception_handler(ClientDisconnect)(_gone)
  app.add_middleware(_Counting, service=service)
  return app


async def _answer(
  service: Service,
  request: Request,
  kind: type[Any],
  prepare: Callable[[Any], Work],
) -> Response:
  """Reads, checks, queues and answers a generation request."""
  body = await _body(request)

  def parse_and_prepare() -> tuple[GenerationRequest, Work]:
    parsed = parse_request(kind, body)
    return parsed, prepare(parsed)

  if len(body) > _LONG_BODY:
    parsed, work = await asyncio.to_thread(parse_and_prepare)
  else:
    parsed, work = parse_and_prepare()
  shape = AnswerShape(
    model=service.name,
    chat=kind is ChatRequest,
    tokenizer=service.tokenizer,
    num_top=parsed.num_top,
    thinkers=work.thinkers,
  )
  running = Running(service, work)
  if parsed.stream:
    events = streamed_answer(running, work, shape, include_usage=parsed.includes_usage)
    return EventStream(events, close=running.close)
  try:
    answer = await unless_gone(request.receive, whole_answer(running, work, shape))
  except ClientGone:
    return await _gone(request, None)
  finally:
    running.close()
  return JSONResponse(answer)


async def _body(request: Request) -> bytes:
  """The body, if it is not too large."""
  parts, size = [], 0
  async for part in request.stream():
    size += len(part)
    if size > MAX_BODY_BYTES:
      raise Refusal(413, f'the body exceeds {MAX_BODY_BYTES} bytes', code='body_too_large')
    parts.append(part)
  return b''.join(parts)


def _model_card(service: Service, created: int) -> dict[str, Any]:
  strategies = service.strategies
  return {
    'id': service.name,
    'object': 'model',
    'created': created,
    'owned_by': 'exitax',
    'context': service.context,
    'layers': list(strategies.layers),
    'strategies': list(strategies.plans),
    'default_strategy': strategies.default,
    'threshold': strategies.default_threshold,
    'confidence': strategies.confidence.value,
    'certified': strategies.has_certificate,
    'max_thinkers': service.max_thinkers,
  }


def _page(file: str) -> Callable[[], Awaitable[Response]]:
  content = importlib.resources.files('exitax.serve').joinpath('page', file).read_bytes()
  media_type = _MEDIA_TYPES[file.rpartition('.')[2]]

  async def page() -> Response:
    return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

  return page


async def _gone(request: Request, error: Exception | None) -> Response:
  """An answer that nobody reads."""
  del request, error
  return Response(status_code=499)


async def _refuse(request: Request, error: Exception) -> Response:
  del request
  if not isinstance(error, Refusal):
    raise error
  return refusal_response(error)


async def _refuse_route(request: Request, error: Exception) -> Response:
  """Unknown paths and methods, in the shape of all other errors."""
  if not isinstance(error, HTTPException):
    raise error
  return refusal_response(
    Refusal(error.status_code, f'{request.method} {request.url.path[:80]}: {error.detail}')
  )


class _Counting:
  """Counts answers by endpoint and status."""

  def __init__(self, app: ASGIApp, service: Service) -> None:
    self._app, self._requests = app, service.metrics.requests

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def counted(message: Message) -> None:
      if message['type'] == 'http.response.start':
        known = scope['path'] in _PAGE or scope['path'] in _ENDPOINTS
        path = scope['path'] if known else 'other'
        self._requests.labels(path, message['status']).inc()
      await send(message)

    await self._app(scope, receive, counted if scope['type'] == 'http' else send)


_ENDPOINTS = frozenset(
  {'/v1/completions', '/v1/chat/completions', '/v1/models', '/health', '/metrics'}
)
