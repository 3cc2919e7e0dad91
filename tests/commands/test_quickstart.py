"""The quickstart from beginning to end, made small, and what it tells to try next."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.commands.conftest import RunCommand
from tests.docs.test_commands_in_documents import (
  SMALL,
  SMALL_EVALUATION,
  documented_commands,
  exitax_commands,
)


@pytest.mark.slow
def test_quickstart(
  exitax: RunCommand,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.chdir(tmp_path)
  small = [flag for flag in SMALL if 'TRAIN_STEPS' not in flag]
  arguments = ('quickstart', *small, '--gin.TRAIN_STEPS=4', *SMALL_EVALUATION)
  outcome = exitax(*arguments)
  assert outcome.status == 0, outcome.err
  model_dir = tmp_path / 'runs' / 'quickstart'
  report = json.loads((model_dir / 'evaluation' / 'evaluation.json').read_text())
  assert [score['name'] for score in report['exits']] == ['exit_2', 'exit_4', 'final']
  assert (model_dir / 'evaluation' / 'evaluation.png').read_bytes().startswith(b'\x89PNG')
  assert 'step      4/4' in outcome.out
  listed = [line for line in outcome.out.splitlines() if line.startswith('layers per token: ')]
  for line in listed:
    depths = line.removeprefix('layers per token: ').split()
    assert len(depths) == 48 and set(depths) <= {'2', '4', '6'}
  assert len(listed) == 2
  assert '\x1b' not in outcome.out  # Piped: no colours.
  for line in outcome.out.splitlines():
    if line.startswith(('picture', 'numbers')):
      assert all((tmp_path / name).exists() for name in line.split(maxsplit=1)[1].split(', '))

  commands = {command.split()[0]: command for command in exitax_commands(outcome.out)}
  assert set(commands) == {'generate', 'advise', 'serve', 'inspect', 'train'}
  for name in ('generate', 'inspect'):
    assert exitax(*shlex.split(commands[name])).status == 0
  for name in ('advise', 'serve'):  # Run by the tests of the documents.
    assert any(command.startswith(commands[name]) for command in documented_commands())
  further = exitax(*shlex.split(commands['train']), *small, '--gin.TRAIN_STEPS=5')
  assert 'resuming from step 4' in further.out

  again = exitax(*arguments, '--gin.TRAIN_STEPS=5')
  assert again.status == 0
  assert 'resuming from step 5' in again.out
