"""Roll-calls over real sockets: who is missing, who differs, who is a stranger."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from exitax.errors import UserError
from exitax.parallel import attendance, hold_roll_call, messages, roll_call

LINES = ('TRAIN_STEPS = 8', "MODEL_DIR = 'm'", 'jax = 1')


@pytest.fixture
def port():
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def _hold(port, process_id, *, num_processes=2, lines=LINES, seconds=10.0, delay=0.0):
  """The message of one process, None if all is well."""
  time.sleep(delay)
  try:
    hold_roll_call(
      f'localhost:{port}',
      process_id=process_id,
      num_processes=num_processes,
      configuration=lines,
      seconds=seconds,
    )
  except UserError as error:
    return str(error)
  return None


def _together(*calls):
  """The messages of several processes, in order."""
  with ThreadPoolExecutor(len(calls)) as pool:
    return [future.result() for future in [pool.submit(call) for call in calls]]


@contextlib.contextmanager
def _visitor(port, content=b''):
  """A connection of a stranger who says `content`."""
  for _ in range(200):
    try:
      connection = socket.create_connection(('localhost', port))
      break
    except OSError:
      time.sleep(0.02)
  with connection:
    with contextlib.suppress(OSError):
      connection.sendall(content)
    yield connection


def test_all_are_there_and_the_port_is_free_again(port):
  calls = [lambda i=i: _hold(port, i, num_processes=4, delay=0.1 * (3 - i)) for i in range(4)]
  assert _together(*calls) == [None] * 4
  # jax opens the same port a moment later.
  with socket.create_server(('', port)):
    pass
  assert _together(*calls) == [None] * 4


def test_missing_processes_are_named_in_all_that_are_there(port):
  start = time.monotonic()
  zero, two = _together(
    lambda: _hold(port, 0, num_processes=6, seconds=1),
    lambda: _hold(port, 2, num_processes=6, seconds=30),
  )
  assert time.monotonic() - start < 10
  host = socket.gethostname()
  assert zero == two
  assert zero.startswith(
    f'of 6 processes, process 1, 3-5 did not come to localhost:{port} within 1 s; '
    f'present: 0 ({host}), 2 ({host}): '
  )


def test_a_process_that_ended_while_waiting_is_missing(port):
  entry = attendance.make_entry(process_id=1, num_processes=3, host='h', configuration=LINES)
  message = messages.make_message(attendance.encode_entry(entry))

  def leave_early():
    with _visitor(port, message):
      time.sleep(0.2)

  zero, _ = _together(lambda: _hold(port, 0, num_processes=3, seconds=1), leave_early)
  assert 'process 1-2 did not come' in zero


def test_nobody_calls(port):
  message = _hold(port, 1, seconds=0.5)
  assert message.startswith(f'process 1 ({socket.gethostname()}) did not reach process 0 at ')
  assert f'localhost:{port} within 0.5 s (Connection refused)' in message


def test_something_else_listens(port):
  with socket.create_server(('localhost', port)) as server:

    def greet():
      for _ in range(3):
        connection, _ = server.accept()
        with connection:
          connection.sendall(b'SSH-2.0-OpenSSH_9.2\r\n')

    threading.Thread(target=greet, daemon=True).start()
    message = _hold(port, 1, seconds=0.5)
  assert 'something else than exitax answers there' in message


def test_differing_lines_are_shown_with_both_values(port):
  other = ('TRAIN_STEPS = 9', "MODEL_DIR = 'm'", 'jax = 1', 'Extra.flag = True')
  told = _together(
    lambda: _hold(port, 0, num_processes=4),
    lambda: _hold(port, 1, num_processes=4),
    lambda: _hold(port, 2, num_processes=4, lines=other),
    lambda: _hold(port, 3, num_processes=4, lines=other),
  )
  host = socket.gethostname()
  assert len(set(told)) == 1
  assert f'TRAIN_STEPS is 9 on process 2 ({host}) and 8 on process 0 ({host})' in told[0]
  assert f'Extra.flag is True on process 2 ({host}) and not set on process 0' in told[0]
  assert 'process 3 differ too' in told[0]
  assert '\n' not in told[0]


def test_one_number_given_twice(port):
  start = time.monotonic()
  told = _together(
    lambda: _hold(port, 0, num_processes=3, seconds=60),
    lambda: _hold(port, 1, num_processes=3, seconds=60),
    lambda: _hold(port, 1, num_processes=3, seconds=60),
  )
  assert time.monotonic() - start < 10  # At once: as many have spoken as there should be.
  assert len(set(told)) == 1
  assert told[0].startswith('process_id=1 was given to 2 processes')
  assert 'give each its own, 0 to 2' in told[0]


def test_another_number_of_processes(port):
  told = _together(lambda: _hold(port, 0), lambda: _hold(port, 1, num_processes=3))
  assert told[0] == told[1]
  assert 'was started with num_processes=3, process 0' in told[0]


@pytest.mark.parametrize(
  'content',
  [
    b'GET / HTTP/1.1\r\n\r\n',
    b'',
    messages.MAGIC + b'\xff\xff\xff\xff' + b'x' * 1000,
    messages.make_message(b'no json'),
    messages.make_message(b'[' * 100000),
    messages.make_message(json.dumps({'process_id': 1}).encode()),
    messages.make_message(
      json.dumps(
        {
          'process_id': 'one',
          'num_processes': 2,
          'host': 'h',
          'configuration': [],
          'digest': '',
        }
      ).encode()
    ),
    messages.make_message(b'{}') + b'more',
  ],
)
def test_strangers_disturb_nobody(port, content):
  def come_and_stay():
    with _visitor(port, content) as connection:
      if content:
        connection.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
          assert connection.recv(100) == b''  # Hung up on.
      else:
        time.sleep(1)

  told = _together(lambda: _hold(port, 0), come_and_stay, lambda: _hold(port, 1, delay=0.5))
  assert told == [None, None, None]


def test_a_crowd_of_silent_strangers_is_sent_away(port):
  def crowd():
    with contextlib.ExitStack() as stack:
      for _ in range(roll_call._MAX_STRANGERS + 20):
        stack.enter_context(_visitor(port))
      time.sleep(0.5)

  told = _together(lambda: _hold(port, 0), crowd, lambda: _hold(port, 1, delay=0.4))
  assert told == [None, None, None]


def test_a_taken_port_is_named(port):
  with socket.create_server(('', port)):
    message = _hold(port, 0, seconds=1)
  assert message.startswith(f'port {port} of this host')
  assert 'Address already in use' in message


@pytest.mark.parametrize('process_id', [0, 1])
def test_an_unknown_name_is_named(process_id):
  with pytest.raises(UserError, match=r"cannot resolve the name 'no\.such\.host\.invalid'"):
    hold_roll_call(
      'no.such.host.invalid:4000',
      process_id=process_id,
      num_processes=2,
      configuration=(),
      seconds=0.5,
    )


@pytest.mark.parametrize('address', ['host', 'host:', ':80', 'host:0', 'host:65536', 'host:x'])
def test_an_address_needs_host_and_port(address):
  with pytest.raises(UserError, match='is not HOST:PORT'):
    roll_call.split_address(address)


def test_addresses_of_both_kinds():
  assert roll_call.split_address('node0:8476') == ('node0', 8476)
  assert roll_call.split_address('[fd00::1]:80') == ('fd00::1', 80)


def _entry(number, *, lines=LINES, host='h', count=2):
  return attendance.make_entry(
    process_id=number, num_processes=count, host=host, configuration=lines
  )


def _problem(*entries):
  return attendance.problem_with(entries, address='a:1', seconds=5)


def test_long_values_are_shown_where_they_differ():
  long = 'x = ' + 'a' * 500
  message = _problem(_entry(0, lines=[long + 'b' * 500]), _entry(1, lines=[long + 'c' * 500]))
  assert 'ac' in message and 'ab' in message
  assert len(message) < 500


def test_differences_beyond_what_is_sent_are_still_found():
  lines = [f'line{i} = {"v" * 1000}' for i in range(500)]
  sent = _entry(0, lines=[*lines, 'last = 1'])
  assert len(attendance.encode_entry(sent)) < messages.MAX_MESSAGE
  assert len(sent.configuration) < len(lines)
  assert 'lines beyond those compared' in _problem(sent, _entry(1, lines=[*lines, 'last = 2']))
  assert _problem(sent, _entry(1, lines=[*lines, 'last = 1'])) is None


def test_what_comes_from_the_network_cannot_steer_a_terminal():
  entry = attendance.decode_entry(
    attendance.encode_entry(_entry(1, host='\x1b[31mred', lines=['x = \x1b]0;t\x07']))
  )
  message = _problem(_entry(0, lines=['x = 1']), entry)
  assert message.isprintable()


def test_many_who_are_missing_are_told_shortly():
  there = [_entry(number, count=4096) for number in range(2048)]
  message = _problem(*there)
  assert 'process 2048-4095 did not come' in message
  assert len(message) < 500
