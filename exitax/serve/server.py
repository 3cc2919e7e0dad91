"""The process: a bound socket, uvicorn, and an end that lets running answers finish."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from exitax.errors import UserError
from exitax.serve.engine import Engine


def bind(host: str, port: int) -> socket.socket:
  """A socket that listens on an address, before anything slow happens.

  It listens already: of two sockets that are only bound, the second would learn of the first when
  everything is compiled.

  Raises:
    UserError: the address is taken, not this machine's, or none at all.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  bound = socket.socket(family, socket.SOCK_STREAM)
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind((host, port))
    bound.listen()
  except (OSError, UnicodeError, TypeError, ValueError) as error:  # Names that are none, too.
    bound.close()
    reason = getattr(error, 'strerror', None) or error
    found = isinstance(error, OSError) and not isinstance(error, socket.gaierror)
    fix = 'try --port=0' if found else 'give --host=127.0.0.1, or another address of this machine'
    shown = ascii(host)[1:-1]
    raise UserError(f'cannot listen on {shown} port {port}: {reason}; {fix}') from None
  return bound


def address_of(bound: socket.socket) -> str:
  """The URL at which a bound socket is reached."""
  host, port = bound.getsockname()[:2]
  return f'http://{f"[{host}]" if ":" in host else host}:{port}'


class DrainingServer(uvicorn.Server):
  """Told to stop, it refuses new requests (503), lets running answers finish, and then ends.

  A second signal, or the deadline, ends what is still running.
  """

  def __init__(
    self,
    app: FastAPI,
    *,
    engine: Engine,
    drain_timeout: float,
    on_ready: Callable[[], None] = lambda: None,
  ) -> None:
    """Wraps the application; `run(sockets=[...])` serves, and calls `on_ready` once it listens."""
    super().__init__(
      uvicorn.Config(
        app,
        http='h11',
        ws='none',
        lifespan='off',
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
      )
    )
    self._engine, self._drain_timeout = engine, drain_timeout
    self._on_ready = on_ready
    self._deadline: float | None = None

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """Listens."""
    await super().startup(sockets=sockets)
    self._on_ready()

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """Begins to drain, or ends at once the second time."""
    del sig, frame
    now = time.monotonic()
    self._deadline = now + self._drain_timeout if self._deadline is None else now
    self._engine.drain()

  async def on_tick(self, counter: int) -> bool:
    """Looks every 0.1 s whether it is time to go."""
    if self._deadline is not None:
      late = time.monotonic() >= self._deadline
      if late:
        self._engine.stop()  # Refuses what still runs, so that its answers end.
      if late or self._engine.idle:
        self.should_exit = True
    return await super().on_tick(counter)


def serve(
  app: FastAPI,
  bound: socket.socket,
  *,
  engine: Engine,
  drain_timeout: float,
  on_ready: Callable[[], None],
) -> None:
  """Runs the engine and the HTTP server until SIGTERM or SIGINT; `on_ready` is called in between."""
  engine.start()
  server = DrainingServer(app, engine=engine, drain_timeout=drain_timeout, on_ready=on_ready)
  try:
    server.run(sockets=[bound])
  finally:
    engine.stop()
