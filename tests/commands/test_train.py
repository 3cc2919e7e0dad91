"""exitax train and inspect, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from exitax.training import read_metrics
from tests.commands.conftest import RunCommand


def test_a_run_leaves_the_files_that_it_promises(trained: Path) -> None:
  names = {path.name for path in trained.iterdir()}
  promised = 'config.gin model-info.txt model.json tokenizer checkpoints metrics.jsonl tensorboard'
  assert set(promised.split()) <= names
  assert sorted(path.name for path in (trained / 'checkpoints').iterdir()) == ['4', '8']
  assert json.loads((trained / 'model.json').read_text())['model']['num_layers'] == 3
  assert 'LoopConfig.train_steps = %TRAIN_STEPS' in (trained / 'config.gin').read_text()
  assert 'embed/matrix' in (trained / 'model-info.txt').read_text()


def test_every_exit_is_reported(trained: Path) -> None:
  lines = read_metrics(trained)
  trained_lines = [line for line in lines if 'train/loss' in line]
  assert [line['step'] for line in trained_lines] == [4, 8]
  for name in ('exit_1', 'exit_2', 'final'):
    assert trained_lines[-1][f'train/{name}/nll'] < trained_lines[0][f'train/{name}/nll']
    assert any(f'held_out/{name}/bits_per_byte' in line for line in lines)
  assert trained_lines[-1]['tokens_per_second'] > 0
  assert 0 < trained_lines[-1]['mfu'] < 1


def test_the_same_command_resumes(exitax: RunCommand, tiny_gin: Path, tmp_path: Path) -> None:
  flags = (f'--gin_file={tiny_gin}', f'--model_dir={tmp_path}')
  first = exitax('train', *flags, '--gin.TRAIN_STEPS=4')
  again = exitax('train', *flags, '--gin.TRAIN_STEPS=6')
  assert (first.status, again.status) == (0, 0)
  assert 'resuming' not in first.out
  assert 'resuming from step 4' in again.out
  assert 'step      6/6' in again.out


def test_a_dry_run_writes_nothing(exitax: RunCommand, tiny_gin: Path, tmp_path: Path) -> None:
  model_dir = tmp_path / 'model'
  outcome = exitax('train', f'--gin_file={tiny_gin}', f'--model_dir={model_dir}', '--dry_run')
  assert outcome.status == 0
  assert 'blocks/mlp/gate/kernel' in outcome.out
  assert '8 x 32 = 256 tokens' in outcome.out
  assert not model_dir.exists()


def test_inspect_shows_the_mesh(exitax: RunCommand, tiny_gin: Path, tmp_path: Path) -> None:
  outcome = exitax(
    'inspect', f'--gin_file={tiny_gin}', f'--model_dir={tmp_path}', '--gin.MeshConfig.tensor=2'
  )
  assert outcome.status == 2  # A directory without a model.
  outcome = exitax(
    'inspect', f'--gin_file={tiny_gin}', '--gin.MODEL_DIR="unused"', '--gin.MeshConfig.tensor=2'
  )
  assert outcome.status == 0
  assert 'mesh data=4 x pipeline=1 x tensor=2' in outcome.out
  row = next(line for line in outcome.out.splitlines() if line.startswith('blocks/mlp/gate/kernel'))
  assert 'layers embed mlp' in row
  assert '- data tensor' in row


def test_inspect_reads_a_model_directory(exitax: RunCommand, trained: Path) -> None:
  outcome = exitax('inspect', f'--model_dir={trained}')
  assert outcome.status == 0
  assert 'after layer 1 (norm head, final matrix)' in outcome.out
  assert 'tokenizer of 264 ids' in outcome.out


def test_a_folder_named_as_one_of_gin_is_no_obstacle(
  exitax: RunCommand, tiny_gin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (tmp_path / 'runs').mkdir()  # As the quickstart makes it where it is started.
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  outcome = exitax('train', f'--gin_file={tiny_gin}', '--model_dir=unused', '--dry_run')
  assert outcome.status == 0, outcome.err


def test_help_is_readable(exitax: RunCommand) -> None:
  overview = exitax('--help')
  assert overview.status == 0
  assert max(map(len, overview.out.splitlines())) <= 100
  for command in ('quickstart', 'train', 'evaluate', 'generate', 'inspect'):
    assert command in overview.out
    outcome = exitax(command, '--help')
    assert outcome.status == 0
    assert f'exitax {command}' in outcome.out
