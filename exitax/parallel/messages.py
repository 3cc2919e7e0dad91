"""Messages of a roll-call on a byte stream: `MAGIC`, a length in 4 bytes, that many bytes."""

from __future__ import annotations

from exitax.parallel.attendance import MAX_CONFIGURATION

MAGIC = b'exitax roll-call 1\n'
# JSON may write a character as six.
MAX_MESSAGE = 6 * MAX_CONFIGURATION + (1 << 16)
_HEADER = len(MAGIC) + 4


def make_message(content: bytes) -> bytes:
  """The bytes that carry `content`."""
  return MAGIC + len(content).to_bytes(4, 'big') + content


def take_message(received: bytes) -> bytes | None:
  """The content of a whole message, None while it is not whole.

  Raises:
    ValueError: this is no message, or one that is too long.
  """
  if received[: len(MAGIC)] != MAGIC[: len(received)]:
    raise ValueError('something else than exitax answers there')
  if len(received) < _HEADER:
    return None
  size = int.from_bytes(received[len(MAGIC) : _HEADER], 'big')
  if size > MAX_MESSAGE or len(received) > _HEADER + size:
    raise ValueError('a message there is too long')
  return received[_HEADER:] if len(received) == _HEADER + size else None
