"""Who may ask: an API key, and for a server on loopback the names by which one reaches it."""

from __future__ import annotations

import hmac
import ipaddress

from exitax.errors import UserError
from exitax.serve.refusals import Refusal


def check_usable(api_key: str, *, name: str) -> None:
  """Refuses a key that no client can send in a header; the message does not show it.

  Args:
    api_key: what is to be asked for.
    name: where it comes from, for the message.

  Raises:
    UserError: it is empty, or has blanks or anything beyond printable ASCII.
  """
  if not api_key:
    raise UserError(f'{name} is empty: give a key, or leave it out to ask for none')
  for place, character in enumerate(api_key, start=1):
    if not '!' <= character <= '~':
      raise UserError(
        f'{name}: character {place} of {len(api_key)} is a blank or no printable ASCII, which no '
        'client can send: choose another key'
      )


def check_key(authorization: str | None, *, api_key: str | None) -> None:
  """Compares `Authorization: Bearer KEY` in constant time.

  Raises:
    Refusal: 401, the key is missing or another.
  """
  if api_key is None:
    return
  scheme, _, given = (authorization or '').partition(' ')
  matches = hmac.compare_digest(_bytes_of(given.strip()), _bytes_of(api_key))
  if scheme.lower() != 'bearer' or not matches:
    raise Refusal(
      401,
      'this server asks for its API key: send the header "Authorization: Bearer KEY"',
      code='invalid_api_key',
    )


def _bytes_of(text: str) -> bytes:
  return text.encode(errors='surrogatepass')


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach an address."""
  if host == 'localhost':
    return True
  try:
    return ipaddress.ip_address(host.strip('[]')).is_loopback
  except ValueError:
    return False


def check_host(header: str | None, *, bound_to: str) -> None:
  """Refuses names of other hosts on loopback: a web page elsewhere may point its name at us.

  Raises:
    Refusal: 421.
  """
  if header is None or not is_loopback(bound_to):
    return
  name = header.rpartition(':')[0] if header.rpartition(':')[2].isdigit() else header
  if not is_loopback(name.lower()):
    raise Refusal(
      421, 'this server listens on loopback only: call it 127.0.0.1 or localhost', code='wrong_host'
    )
