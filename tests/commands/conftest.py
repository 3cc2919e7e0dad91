"""A small trained model directory, made by the command itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from exitax.commands.main import main

TINY = """
include 'runs/pretrain.gin'
TRAIN_STEPS = 8
BATCH_SIZE = 8
TASK_FEATURE_LENGTHS = {'targets': 32}
MIXTURE_OR_TASK_NAME = @Task()
Task.name = 'notes'
Task.source = @TextSource()
DataConfig.vocabulary = @ByteVocabulary()
DataConfig.split = @SplitConfig()
SplitConfig.fraction = 0.3
ModelConfig.vocab_size = 264
ModelConfig.num_layers = 3
ModelConfig.embed_dim = 16
ModelConfig.num_heads = 2
ModelConfig.mlp_dim = 32
ModelConfig.max_length = 64
ModelConfig.exits = @exits()
exits.layers = (1, 2)
ObjectiveConfig.exit_weights = @exit_weights()
exit_weights.start = (0.25, 0.5)
LoopConfig.log_period = 4
LoopConfig.checkpoint_period = 4
"""


class Outcome:
  """What a command printed and its exit status."""

  def __init__(self, status: int, out: str, err: str) -> None:
    self.status, self.out, self.err = status, out, err


RunCommand = Callable[..., Outcome]


@pytest.fixture
def exitax(capfd: pytest.CaptureFixture[str]) -> RunCommand:
  """Runs `exitax ...` in this process."""

  def run(*argv: str) -> Outcome:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
      main([str(argument) for argument in argv])
    captured = capfd.readouterr()
    return Outcome(int(stop.value.code or 0), captured.out, captured.err)

  return run


def write_corpus(folder: Path, *, files: int = 40) -> None:
  """Short texts that differ from each other."""
  folder.mkdir()
  for i in range(files):
    words = [f'w{(i * 37 + j * j * 11) % 97}' for j in range(40)]
    (folder / f'{i}.txt').write_text(' '.join(words))


@pytest.fixture(scope='session')
def tiny_gin(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run file over a small corpus."""
  folder = tmp_path_factory.mktemp('tiny')
  write_corpus(folder / 'corpus')
  path = folder / 'tiny.gin'
  path.write_text(TINY + f"TextSource.paths = ('{folder / 'corpus'}',)\n")
  return path


@pytest.fixture(scope='session')
def trained(tiny_gin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The model directory of a finished run."""
  model_dir = tmp_path_factory.mktemp('models') / 'trained'
  with pytest.raises(SystemExit) as stop:
    main(['train', f'--gin_file={tiny_gin}', f'--model_dir={model_dir}'])
  assert not stop.value.code
  return model_dir


def digest(folder: Path) -> dict[str, str]:
  """SHA-256 of every file below a folder."""
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }
