"""What the server answers when it will not do what was asked: a status and a reason, never a 500."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(eq=False)
class Refusal(Exception):
  """An answer in the shape of OpenAI's errors.

  Attributes:
    status: of HTTP.
    message: value, limit and fix.
    param: the field of the request, if it is one field's fault.
    code: a word for programs.
    retry_after: seconds until it may be worth another try; None where waiting does not help.
  """

  status: int
  message: str
  param: str | None = None
  code: str | None = None
  retry_after: int | None = None

  def body(self) -> dict[str, Any]:
    """The JSON object to answer with."""
    return {
      'error': {
        'message': self.message,
        'type': _TYPES.get(self.status, 'invalid_request_error'),
        'param': self.param,
        'code': self.code,
      }
    }


_TYPES = {401: 'authentication_error', 429: 'rate_limit_error', 503: 'service_unavailable_error'}


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> Refusal:
  """400: the request cannot be served as it stands."""
  return Refusal(400, message, param, code)


def bad_policy(message: str, *, param: str, code: str = 'exit_policy') -> Refusal:
  """422: a well-formed request asks for an exit policy that this model or server has not got."""
  return Refusal(422, message, param, code)


def queue_full(waiting: int, limit: int, *, retry_after: int) -> Refusal:
  """429: too many prompts wait already."""
  return Refusal(
    429,
    f'{waiting} prompts wait and the queue holds {limit}: try again in {retry_after} s',
    code='queue_full',
    retry_after=retry_after,
  )


def unavailable(message: str, *, code: str, retry_after: int | None = 1) -> Refusal:
  """503: the server is leaving, late or broken; the request itself may be fine."""
  return Refusal(503, message, code=code, retry_after=retry_after)
