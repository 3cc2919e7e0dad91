"""Keys and host names."""

from __future__ import annotations

import pytest

from exitax.errors import UserError
from exitax.serve.refusals import Refusal
from exitax.serve.security import check_host, check_key, check_usable, is_loopback


@pytest.mark.parametrize('header', ['Bearer sesame', 'bearer sesame', 'Bearer  sesame '])
def test_the_right_key(header: str):
  check_key(header, api_key='sesame')


@pytest.mark.parametrize(
  'header', [None, '', 'Bearer', 'Bearer ', 'sesame', 'Basic sesame', 'Bearer Sesame', 'Bearer é']
)
def test_other_keys(header: str | None):
  with pytest.raises(Refusal) as refused:
    check_key(header, api_key='sesame')
  assert refused.value.status == 401


@pytest.mark.parametrize('key', ['', ' ', 'a b', 'a\n', 'sésame', '\udcff', 'a\x7f'])
def test_keys_that_no_client_can_send(key: str):
  with pytest.raises(UserError, match=r'^--api_key'):
    check_usable(key, name='--api_key')
  with pytest.raises(Refusal):
    check_key(f'Bearer x{key}', api_key=key)  # It never fails in another way.


def test_without_a_key_nothing_is_asked():
  check_key(None, api_key=None)


@pytest.mark.parametrize(
  ('host', 'expected'),
  [
    ('127.0.0.1', True),
    ('127.9.9.9', True),
    ('::1', True),
    ('localhost', True),
    ('0.0.0.0', False),
    ('192.168.1.2', False),
    ('example.org', False),
  ],
)
def test_loopback(host: str, expected: bool):
  assert is_loopback(host) is expected


@pytest.mark.parametrize(
  'header', [None, 'localhost', 'LOCALHOST:80', '127.0.0.1:8000', '[::1]:80']
)
def test_names_of_this_machine(header: str | None):
  check_host(header, bound_to='127.0.0.1')


@pytest.mark.parametrize('header', ['evil.example', 'evil.example:8000', 'localhost.evil:80', ''])
def test_a_page_elsewhere_cannot_borrow_loopback(header: str):
  with pytest.raises(Refusal) as refused:
    check_host(header, bound_to='127.0.0.1')
  assert refused.value.status == 421
  check_host(header, bound_to='0.0.0.0')
