"""exitax train in two processes that do not fit each other, and in one that is alone."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.commands.conftest import RunCommand, write_corpus

HOST = socket.gethostname()


@pytest.fixture
def port() -> int:
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def _train(
  commands: Sequence[Sequence[str]],
  env: dict[str, str],
  folders: Sequence[Path | None] | None = None,
) -> list[tuple[int, str, str]]:
  """Runs `exitax train` with each list of flags at once: status, output, what was complained of."""
  processes = [
    subprocess.Popen(
      [sys.executable, '-m', 'exitax', 'train', *flags],
      env=env,
      cwd=folder,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for flags, folder in zip(commands, folders or [None] * len(commands), strict=True)
  ]
  try:
    ends = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]


def _place(port: int, index: int) -> list[str]:
  return [
    f'--coordinator_address=localhost:{port}',
    '--num_processes=2',
    f'--process_id={index}',
    '--emulate_devices=1',
  ]


@pytest.mark.processes
def test_another_configuration_on_one_host(
  tiny_gin: Path, tmp_path: Path, subprocess_env: dict[str, str], port: int
) -> None:
  flags = [f'--gin_file={tiny_gin}', f'--model_dir={tmp_path / "model"}']
  ends = _train(
    [[*flags, *_place(port, 0)], [*flags, *_place(port, 1), '--gin.TRAIN_STEPS=9']], subprocess_env
  )
  for status, output, errors in ends:
    assert status == 2, errors
    assert output == ''
    assert errors == (
      'exitax: processes are configured differently: TRAIN_STEPS is 9 on process 1 '
      f'({HOST}) and 8 on process 0 ({HOST}): start all with the same flags, gin files and '
      'releases\n'
    )
  assert not (tmp_path / 'model').exists()


@pytest.mark.processes
def test_a_host_that_does_not_come(
  tiny_gin: Path, tmp_path: Path, subprocess_env: dict[str, str], port: int
) -> None:
  flags = [f'--gin_file={tiny_gin}', f'--model_dir={tmp_path / "model"}', '--roll_call_seconds=1']
  [(status, output, errors)] = _train([[*flags, *_place(port, 0)]], subprocess_env)
  assert (status, output) == (2, '')
  assert errors.startswith(
    f'exitax: of 2 processes, process 1 did not come to localhost:{port} within 1 s; '
    f'present: 0 ({HOST}): '
  )
  [(status, output, errors)] = _train([[*flags, *_place(port, 1)]], subprocess_env)
  assert (status, output) == (2, '')
  assert errors.startswith(
    f'exitax: process 1 ({HOST}) did not reach process 0 at localhost:{port}'
  )
  assert errors.count('\n') == 1


@pytest.mark.processes
def test_an_error_of_one_host_ends_all(
  tiny_gin: Path, tmp_path: Path, subprocess_env: dict[str, str], port: int
) -> None:
  """The texts of a relative path are on one host only; the other does not wait for it."""
  for name in ('here', 'there'):
    (tmp_path / name).mkdir()
  write_corpus(tmp_path / 'here' / 'texts')
  flags = [
    f'--gin_file={tiny_gin}',
    f'--model_dir={tmp_path / "model"}',
    "--gin.TextSource.paths=('texts',)",
  ]
  start = time.monotonic()
  ends = _train(
    [[*flags, *_place(port, 0)], [*flags, *_place(port, 1)]],
    subprocess_env,
    [tmp_path / 'here', tmp_path / 'there'],
  )
  assert time.monotonic() - start < 90  # jax alone would wait for 100 seconds of heartbeats.
  assert [status for status, _, _ in ends] == [2, 2], ends
  assert (
    'exitax: process 1 of 2 failed in reading its data: see the message of that process'
    in ends[0][2]
  )
  assert 'exitax: process 1 of 2: ' in ends[1][2]
  assert 'texts' in ends[1][2]


@pytest.mark.processes
def test_a_host_that_cannot_write_ends_the_others(
  tiny_gin: Path, tmp_path: Path, subprocess_env: dict[str, str], port: int
) -> None:
  """Where the second host has a file of the directory's name."""
  for name in ('here', 'there'):
    (tmp_path / name).mkdir()
  (tmp_path / 'there' / 'model').write_text('in the way')
  flags = [f'--gin_file={tiny_gin}', '--model_dir=model']
  ends = _train(
    [[*flags, *_place(port, 0)], [*flags, *_place(port, 1)]],
    subprocess_env,
    [tmp_path / 'here', tmp_path / 'there'],
  )
  assert [status for status, _, _ in ends] == [2, 2], ends
  assert 'exitax: process 1 of 2 failed in describing the run in MODEL_DIR' in ends[0][2]
  assert 'exitax: process 1 of 2: MODEL_DIR=model cannot be written to' in ends[1][2]


@pytest.mark.processes
def test_no_cluster_to_ask(tiny_gin: Path, tmp_path: Path, subprocess_env: dict[str, str]) -> None:
  [(status, _, errors)] = _train(
    [[f'--gin_file={tiny_gin}', f'--model_dir={tmp_path / "model"}', '--multihost']],
    subprocess_env,
  )
  assert status == 2
  assert errors.startswith('exitax: jax finds no cluster here')
  assert 'give --coordinator_address, --num_processes and --process_id' in errors


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--process_id=0'], '--process_id without --coordinator_address and --num_processes'),
    (['--num_processes=2', '--process_id=1'], 'without --coordinator_address: give all three'),
    (
      ['--coordinator_address=a:1', '--num_processes=2', '--process_id=2'],
      '--process_id=2 is outside 0 to num_processes-1=1',
    ),
    (
      ['--coordinator_address=a', '--num_processes=2', '--process_id=1'],
      '--coordinator_address=a is not HOST:PORT',
    ),
    (
      ['--coordinator_address=a:1', '--num_processes=2', '--process_id=1', '--multihost'],
      '--multihost asks the cluster for --coordinator_address, --num_processes, --process_id: give',
    ),
    (
      [
        '--coordinator_address=no.such.host.invalid:1',
        '--num_processes=2',
        '--process_id=1',
        '--roll_call_seconds=0.1',
      ],
      "cannot resolve the name 'no.such.host.invalid'",
    ),
  ],
)
def test_flags_that_do_not_fit(
  exitax: RunCommand, tiny_gin: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
  outcome = exitax('train', f'--gin_file={tiny_gin}', f'--model_dir={tmp_path}', *flags)
  assert outcome.status == 2
  assert outcome.err.startswith('exitax: ') and outcome.err.count('\n') == 1
  assert message in outcome.err


def test_one_process_that_is_told_so_is_alone(
  exitax: RunCommand, tiny_gin: Path, tmp_path: Path
) -> None:
  place = ['--coordinator_address=localhost:1', '--num_processes=1', '--process_id=0']
  outcome = exitax(
    'train', f'--gin_file={tiny_gin}', f'--model_dir={tmp_path}', '--dry_run', *place
  )
  assert outcome.status == 0
  assert 'training state' in outcome.out
