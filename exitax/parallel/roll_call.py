"""A roll-call over TCP before jax starts: who is missing, who is configured differently.

`jax.distributed.initialize` aborts a process whose peers do not come, and names nobody. So process
0 first listens on the coordinator's own port (jax takes it over afterwards, so one port is all that
a firewall must let through), the others connect and say who they are, and all get one answer.

What does not look like a message (see `messages`) is dropped, so that a port scanner disturbs
nobody. As with jax's own service, nothing is encrypted or
authenticated: the port belongs into a trusted network.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Sequence

from exitax.errors import UserError
from exitax.parallel.attendance import (
  Entry,
  decode_entry,
  encode_entry,
  make_entry,
  problem_with,
)
from exitax.parallel.messages import make_message, take_message

# How long a stranger may say nothing, and how many may do so at once.
_SILENT_SECONDS = 10.0
_MAX_STRANGERS = 64
_RETRY_SECONDS = 0.3
# A cluster's name server may know a host only some time after it has started.
_NAME_SECONDS = 30.0
# What an answer may need beyond the deadline.
_SLACK_SECONDS = 15.0


def hold_roll_call(
  address: str,
  *,
  process_id: int,
  num_processes: int,
  configuration: Sequence[str],
  seconds: float = 300.0,
) -> None:
  """Returns when all processes are there and configured alike; at the latest after `seconds`.

  Args:
    address: `host:port` of process 0.
    process_id: this process, 0 or more and below `num_processes`.
    num_processes: of the run.
    configuration: lines 'name = value' that must be the same in all processes.
    seconds: how long to wait for all.

  Raises:
    UserError: somebody is missing, twice there or configured differently, with the same message in
      every process that is there; process 0 cannot be reached; the port is taken.
  """
  host, port = split_address(address)
  own = make_entry(
    process_id=process_id,
    num_processes=num_processes,
    host=socket.gethostname(),
    configuration=configuration,
  )
  if process_id == 0:
    problem = _call(own, address, port, seconds)
  else:
    problem = _answer(own, (host, port), address, seconds)
  if problem:
    raise UserError(problem)


def split_address(address: str) -> tuple[str, int]:
  """Host and port of `host:port`, where an IPv6 host may stand in brackets.

  Raises:
    UserError: it is not of that form.
  """
  host, _, port = address.rpartition(':')
  if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
    raise UserError(
      f'--coordinator_address={address} is not HOST:PORT: name the host of process 0 and a free '
      'port from 1 to 65535 on it, such as node0:8476'
    )
  return host.removeprefix('[').removesuffix(']'), int(port)


# Process 0


class _Guest:
  """A connection to process 0 and what has come over it."""

  def __init__(self, connection: socket.socket) -> None:
    self.connection = connection
    self.since = time.monotonic()
    self.entry: Entry | None = None
    self._received = b''

  def read(self) -> bool:
    """Takes what is there; False if this is nobody, or nobody any more."""
    try:
      part = self.connection.recv(1 << 16)
    except BlockingIOError:
      return True
    except OSError:
      return False
    if not part or self.entry is not None:
      return False
    self._received += part
    try:
      content = take_message(self._received)
    except ValueError:
      return False
    if content is not None:
      self.entry = decode_entry(content)
      return self.entry is not None
    return True


class _Caller:
  """Process 0's side: listens until as many processes have spoken as there should be."""

  def __init__(self, listener: socket.socket) -> None:
    self._listener = listener
    self._selector = selectors.DefaultSelector()
    self._selector.register(listener, selectors.EVENT_READ)
    self.guests: list[_Guest] = []

  def listen(self, count: int, deadline: float) -> None:
    """Until `count` others have spoken (whatever they said), or the deadline."""
    while sum(guest.entry is not None for guest in self.guests) < count:
      left = deadline - time.monotonic()
      if left <= 0:
        return
      for key, _ in self._selector.select(min(left, 1.0)):
        if key.fileobj is self._listener:
          self._accept()
        elif not key.data.read():
          self._drop(key.data)
      self._drop_silent()

  def answer(self, problem: str | None) -> None:
    """Tells every process, and waits a moment for each to hang up first."""
    content = make_message(json.dumps({'problem': problem}).encode())
    known = [guest for guest in self.guests if guest.entry is not None]
    for guest in known:
      guest.connection.settimeout(5.0)
      with contextlib.suppress(OSError):
        guest.connection.sendall(content)
    for guest in known:
      # The side that closes first keeps the port busy for a while: jax wants this one.
      guest.connection.settimeout(1.0)
      with contextlib.suppress(OSError):
        guest.connection.recv(1)

  def close(self) -> None:
    for guest in list(self.guests):
      self._drop(guest)
    self._selector.close()

  def _accept(self) -> None:
    with contextlib.suppress(OSError):
      connection, _ = self._listener.accept()
      connection.setblocking(False)
      guest = _Guest(connection)
      self.guests.append(guest)
      self._selector.register(connection, selectors.EVENT_READ, guest)

  def _drop(self, guest: _Guest) -> None:
    self._selector.unregister(guest.connection)
    guest.connection.close()
    self.guests.remove(guest)

  def _drop_silent(self) -> None:
    silent = [guest for guest in self.guests if guest.entry is None]
    late = time.monotonic() - _SILENT_SECONDS
    surplus = max(0, len(silent) - _MAX_STRANGERS)
    for index, guest in enumerate(silent):
      if guest.since < late or index < surplus:
        self._drop(guest)


def _call(own: Entry, address: str, port: int, seconds: float) -> str | None:
  deadline = time.monotonic() + seconds
  _check_name(address, seconds)
  with contextlib.closing(_listen(port)) as listener:
    caller = _Caller(listener)
    try:
      caller.listen(own.num_processes - 1, deadline)
      entries = [own, *(guest.entry for guest in caller.guests if guest.entry is not None)]
      problem = problem_with(entries, address=address, seconds=seconds)
      caller.answer(problem)
    finally:
      caller.close()
  return problem


def _listen(port: int) -> socket.socket:
  both = socket.has_dualstack_ipv6()
  try:
    listener = socket.create_server(
      ('', port),
      family=socket.AF_INET6 if both else socket.AF_INET,
      backlog=512,
      dualstack_ipv6=both,
    )
  except OSError as error:
    raise UserError(
      f'port {port} of this host ({socket.gethostname()}) cannot be opened ({error.strerror}): '
      'end the run that has it (another process 0?), or choose another in --coordinator_address'
    ) from None
  listener.setblocking(False)
  return listener


# The others


def _answer(own: Entry, place: tuple[str, int], address: str, seconds: float) -> str | None:
  deadline = time.monotonic() + seconds
  _check_name(address, seconds)
  reason = 'no time to try'
  while (left := deadline - time.monotonic()) > 0:
    try:
      return _ask(own, place, min(left, 5.0), seconds)
    except (OSError, ValueError) as error:
      reason = str(getattr(error, 'strerror', None) or error)
    time.sleep(min(_RETRY_SECONDS, max(0.0, deadline - time.monotonic())))
  return (
    f'{own.name} did not reach process 0 at {address} within {seconds:g} s ({reason}): see whether '
    'process 0 started, and whether that is its host and port'
  )


def _ask(own: Entry, place: tuple[str, int], patience: float, seconds: float) -> str | None:
  with socket.create_connection(place, timeout=patience) as connection:
    # A busy port of this host may be given to the connection itself.
    if connection.getsockname() == connection.getpeername():
      raise ValueError('nobody listens there')
    connection.sendall(make_message(encode_entry(own)))
    connection.settimeout(seconds + _SLACK_SECONDS)
    received = b''
    while (content := take_message(received)) is None:
      part = connection.recv(1 << 16)
      if not part:
        raise ValueError('something there hung up without an answer')
      received += part
  try:
    return json.loads(content)['problem']
  except (ValueError, KeyError, TypeError):
    raise ValueError('something else than exitax answers there') from None


def _check_name(address: str, seconds: float) -> None:
  """Raises UserError if the host's name stays unknown."""
  host, port = split_address(address)
  deadline = time.monotonic() + min(seconds, _NAME_SECONDS)
  while True:
    try:
      socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
      return
    except (OSError, UnicodeError) as error:
      if time.monotonic() > deadline:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(
          f'--coordinator_address={address}: this host ({socket.gethostname()}) cannot resolve '
          f'the name {host!r} ({reason}): correct it, or give the IP address'
        ) from None
    time.sleep(_RETRY_SECONDS)
