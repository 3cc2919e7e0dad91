"""A small asyncio client of completions for load: raw HTTP/1.1, times of every event."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """What became of one request.

  Attributes:
    status: of HTTP; 0 if the connection broke.
    tokens: that came.
    first: seconds to the first token, from when the request should have been sent.
    total: seconds to the end.
    layers: mean layers per token.
  """

  status: int
  tokens: int
  first: float
  total: float
  layers: float


class Client:
  """Sends requests to one server."""

  def __init__(self, host: str, port: int) -> None:
    """Takes the server's address."""
    self._host, self._port = host, port

  async def stream(self, body: dict[str, Any], *, kill_after_first: bool = False) -> Outcome:
    """One streamed completion on a connection of its own; or its beginning."""
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(self._host, self._port)
    try:
      writer.write(_post(json.dumps({**body, 'stream': True}).encode(), close=True))
      status = int((await reader.readline()).split()[1])
      first, layers = 0.0, []
      async for line in reader:
        if not line.startswith(b'data: {'):
          continue
        for choice in json.loads(line[6:]).get('choices', ()):
          layers += choice['exit_layers']
        if layers and not first:
          first = time.perf_counter() - start
          if kill_after_first:
            writer.transport.abort()
            break
      total = time.perf_counter() - start
      mean = sum(layers) / max(len(layers), 1)
      return Outcome(status=status, tokens=len(layers), first=first, total=total, layers=mean)
    except (ConnectionError, IndexError):
      return Outcome(status=0, tokens=0, first=0.0, total=0.0, layers=0.0)
    finally:
      writer.close()

  async def burst(self, bodies: Sequence[dict[str, Any]]) -> list[Outcome]:
    """All at once."""
    return list(await asyncio.gather(*(self.stream(body) for body in bodies)))

  async def open_loop(
    self, bodies: Sequence[dict[str, Any]], *, rate: float, seed: int
  ) -> list[Outcome]:
    """Sends at the times of a Poisson process, whether or not the server keeps up."""
    rng, tasks, due = random.Random(seed), [], time.perf_counter()
    for body in bodies:
      due += rng.expovariate(rate)
      await asyncio.sleep(max(0.0, due - time.perf_counter()))
      tasks.append(asyncio.create_task(self.stream(body)))
    return list(await asyncio.gather(*tasks))

  async def statuses(self, requests: Sequence[tuple[str, bytes]]) -> list[int]:
    """The status of each POST of a body to a path, one after the other."""
    found = []
    reader, writer = await asyncio.open_connection(self._host, self._port)
    for path, body in requests:
      writer.write(_post(body, path=path, close=False))
      head = await reader.readuntil(b'\r\n\r\n')
      found.append(int(head.split()[1]))
      length = next(
        int(line.partition(b':')[2])
        for line in head.lower().splitlines()
        if line.startswith(b'content-length')
      )
      await reader.readexactly(length)
    writer.close()
    return found


def malformed(rng: random.Random) -> tuple[str, bytes]:
  """A path and a body that no client should send."""
  wrong = rng.choice([None, 'x', -1, [], {}, [[]], True, '\ud800', 2**80, float('nan'), ['a', 1]])
  names = ['max_tokens', 'n', 'stop', 'seed', 'temperature', 'top_p', 'threshold']
  names += ['strategy', 'use_early_exit', 'confidence', 'stream_options', 'logprobs', 'nonsense']
  body = json.dumps({'prompt': 5, 'max_tokens': 1, rng.choice(names): wrong}).encode()
  kind = rng.randrange(4)
  if kind == 0:
    body = body[: rng.randrange(len(body))]
  elif kind == 1:
    body = rng.randbytes(rng.randrange(1, 60))
  return rng.choice(['/v1/completions', '/v1/chat/completions', '/v1/nothing']), body


def _post(body: bytes, *, close: bool, path: str = '/v1/completions') -> bytes:
  ending = 'connection: close\r\n' if close else ''
  head = f'POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n{ending}\r\n'
  return head.encode() + body
