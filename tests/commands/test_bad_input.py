"""Every mistake gets one clear line and status 2, and nothing already written is damaged."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.commands.conftest import RunCommand, digest

TRAIN_MISTAKES = {
  'unknown parameter': (
    ('--gin.LoopConfig.trainsteps=3',),
    'LoopConfig has no parameter trainsteps: did you mean train_steps?',
  ),
  'unknown class': (('--gin.LoopConfigg.seed=3',), 'did you mean LoopConfig?'),
  'unused macro': (
    ('--gin.TRAIN_STEP=3',),
    'macro TRAIN_STEP is set but nothing uses it: did you mean TRAIN_STEPS?',
  ),
  'unset macro': (('--gin.LoopConfig.seed=%SEED',), 'macro SEED is used but never set'),
  'value without quotes': (('--gin.LoopConfig.seed=abc',), 'strings need quotes'),
  'mesh too large': (
    ('--gin.MeshConfig.data=3', '--gin.MeshConfig.tensor=3'),
    'does not match 8 devices',
  ),
  'mesh does not divide': (('--gin.MeshConfig.tensor=3',), 'does not divide 8 devices'),
  'heads do not divide': (
    ('--gin.MeshConfig.tensor=4',),
    'tensor=4 does not divide num_heads=2: choose 1 or 2',
  ),
  'exit out of range': (
    ('--gin.exits.layers=(1, 3)',),
    'exit layer 3 is out of range: a model of 3 layers has exits after layers 1 to 2',
  ),
  'exit repeated': (('--gin.exits.layers=(1, 1)',), 'exit layer 1 is repeated'),
  'weights for other exits': (
    ('--gin.exit_weights.start=(0.5,)',),
    '1 exit weights for 2 exits',
  ),
  'dropping everything': (
    ('--gin.DropoutConfig.layer_rate=1.0',),
    'DropoutConfig.layer_rate=1.0 is no rate of dropout: choose 0 (drop nothing) or more, below 1',
  ),
  'unknown head': (("--gin.exits.head='big'",), "exits.head='big' is not known"),
  'rows beyond the context': (
    ("--gin.TASK_FEATURE_LENGTHS={'targets': 65}",),
    'length=65 exceeds the context max_length=64',
  ),
  'batch over the mesh': (('--gin.BATCH_SIZE=6',), 'does not divide batch_size=6'),
  'no rows': (('--gin.BATCH_SIZE=0',), 'batch_size=0 must be at least 1'),
  'number in quotes': (
    ("--gin.MeshConfig.tensor='2'",),
    "MeshConfig.tensor='2': write a whole number",
  ),
  'fraction of a step': (('--gin.TRAIN_STEPS=8.5',), 'train_steps=8.5: write a whole number'),
  'neither number nor None': (
    ("--gin.LoopConfig.eval_rows='all'",),
    "LoopConfig.eval_rows='all': write a whole number or None",
  ),
  'two ways to name hosts': (
    ('--multihost', '--process_id=0'),
    '--multihost asks the cluster for --process_id: give one or the other',
  ),
  'unknown task': (("--gin.MIXTURE_OR_TASK_NAME='pile'",), "unknown task or mixture 'pile'"),
  'vocabulary too small': (
    ('--gin.ModelConfig.vocab_size=100',),
    'the tokenizer has 264 ids, vocab_size=100',
  ),
}


# In parameters of every command, whichever is run.
WRONG_TYPES = {
  "GenerateConfig.max_new_tokens='x'": 'write a whole number',
  'GenerateConfig.max_new_tokens=True': 'write a whole number',
  'GenerateConfig.seed=1.5': 'write a whole number',
  "GenerateConfig.temperature='a'": 'write a number or None',
  "GenerateConfig.threshold=[0.1, 'a']": 'write a number or (a number, ...) or a text in quotes',
  'GenerateConfig.top_k=2.5': 'write a whole number or None',
  'ServeConfig.port=1.5': 'write a whole number',
  'ServeConfig.host=3': 'write a text in quotes',
  'ThinkSettings.thinkers=1.5': 'write a whole number',
  'ClassifierConfig.batches=1.5': 'write a whole number',
  "CalibrateConfig.thresholds='a'": 'write (a number, ...)',
  "AdviseConfig.thresholds='a'": 'write (a number, ...)',
  'EvaluateConfig.confidence=3': "write 'max_prob' or 'margin'",
  'DataConfig.mixture=5': 'write a text in quotes or @Task() or @Mixture()',
  'Task.source=5': 'write a name with @',
  "ShardingRules.overrides=('a',)": 'write ((a text in quotes, ',
  "exits.layers=(1, 'b')": 'write (a whole number, ...)',
}


@pytest.mark.parametrize('binding', WRONG_TYPES)
def test_values_of_another_type(exitax: RunCommand, binding: str) -> None:
  outcome = exitax('generate', '--model_dir=unread', '--prompt=w1', f'--gin.{binding}')
  assert_one_line(outcome, f'{binding}: {WRONG_TYPES[binding]}')


@pytest.mark.parametrize(
  'binding', ['threshold=[0.1, 0.2]', 'threshold=0', 'threshold=None', "threshold='certified'"]
)
def test_values_of_one_of_several_types(exitax: RunCommand, binding: str) -> None:
  flags = ('--prompt=w1', f'--gin.GenerateConfig.{binding}')
  assert_one_line(exitax('generate', '--model_dir=absent', *flags), 'model.json does not exist')


def test_parameters_of_commands_are_suggested_too(exitax: RunCommand) -> None:
  flags = ('--prompt=w1', '--gin.GenerateConfig.max_new_token=1')
  outcome = exitax('generate', '--model_dir=unread', *flags)
  assert_one_line(outcome, 'did you mean max_new_tokens?')


@pytest.mark.parametrize('mistake', TRAIN_MISTAKES)
def test_mistakes_in_a_run(
  exitax: RunCommand, tiny_gin: Path, tmp_path: Path, mistake: str
) -> None:
  flags, message = TRAIN_MISTAKES[mistake]
  outcome = exitax('train', f'--gin_file={tiny_gin}', f'--model_dir={tmp_path / "m"}', *flags)
  assert_one_line(outcome, message)
  assert not (tmp_path / 'm' / 'checkpoints').exists()


def test_a_missing_gin_file(exitax: RunCommand) -> None:
  assert_one_line(exitax('train', '--gin_file=nowhere.gin'), '--gin_file=nowhere.gin is not there')


def test_a_model_dir_that_cannot_be_written(exitax: RunCommand, tiny_gin: Path) -> None:
  outcome = exitax('train', f'--gin_file={tiny_gin}', f'--model_dir={tiny_gin / "m"}')
  assert_one_line(outcome, f'MODEL_DIR={tiny_gin / "m"} cannot be written to (Not a directory)')


@pytest.mark.parametrize(
  'command', ['evaluate', 'tune_confidence', 'advise', 'calibrate', 'benchmarks']
)
def test_results_that_cannot_be_written_are_told_before_the_work(
  exitax: RunCommand, trained: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
  def refuse(**_) -> None:
    raise PermissionError(errno.EACCES, 'Permission denied')

  def load(*_, **__) -> None:
    raise AssertionError('the work has begun')

  monkeypatch.setattr('exitax.commands.flags.tempfile.TemporaryFile', refuse)
  monkeypatch.setattr(f'exitax.commands.{command}.load_model', load)
  monkeypatch.setattr('exitax.commands.benchmarks.check_library', lambda: None)
  tasks = ('evaluate', '--tasks=any') if command == 'benchmarks' else (command.replace('_', '-'),)
  outcome = exitax(*tasks, f'--model_dir={trained}')
  assert_one_line(outcome, 'cannot be written to (Permission denied): choose another')


def test_an_output_that_is_a_file(exitax: RunCommand, trained: Path, tiny_gin: Path) -> None:
  outcome = exitax('evaluate', f'--model_dir={trained}', f'--output={tiny_gin}')
  assert_one_line(outcome, f'output={tiny_gin} cannot be written to (File exists)')


def test_a_missing_model_dir(exitax: RunCommand, tiny_gin: Path) -> None:
  outcome = exitax('train', f'--gin_file={tiny_gin}')
  assert_one_line(outcome, 'MODEL_DIR is required: add --model_dir=DIR')


def test_an_unknown_command(exitax: RunCommand) -> None:
  assert_one_line(exitax('trian'), "no command 'trian': choose quickstart, train")


def test_an_empty_corpus(exitax: RunCommand, tiny_gin: Path, tmp_path: Path) -> None:
  (tmp_path / 'empty').mkdir()
  outcome = exitax(
    'train',
    f'--gin_file={tiny_gin}',
    f'--model_dir={tmp_path / "m"}',
    f"--gin.TextSource.paths=('{tmp_path / 'empty'}',)",
  )
  assert_one_line(outcome, str(tmp_path / 'empty'))


def test_a_file_that_is_not_text(exitax: RunCommand, tiny_gin: Path, tmp_path: Path) -> None:
  binary = tmp_path / 'picture.txt'
  binary.write_bytes(bytes(range(256)) * 4)
  outcome = exitax(
    'train',
    f'--gin_file={tiny_gin}',
    f'--model_dir={tmp_path / "m"}',
    f"--gin.TextSource.paths=('{binary}',)",
  )
  assert_one_line(outcome, str(binary))


@pytest.fixture
def copy_of_trained(trained: Path, tmp_path: Path) -> Path:
  """A copy to spoil."""
  return Path(shutil.copytree(trained, tmp_path / 'copy'))


def test_a_flipped_bit(exitax: RunCommand, tiny_gin: Path, copy_of_trained: Path) -> None:
  files = [p for p in (copy_of_trained / 'checkpoints' / '8').rglob('*') if p.is_file()]
  largest = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)
  before = digest(copy_of_trained / 'checkpoints')
  flags = (f'--gin_file={tiny_gin}', f'--model_dir={copy_of_trained}', '--gin.TRAIN_STEPS=9')
  outcome = exitax('train', *flags)
  assert_one_line(outcome, 'step 4 is intact')
  assert largest.name in outcome.err
  assert digest(copy_of_trained / 'checkpoints') == before


def test_a_half_written_checkpoint_is_passed_over(
  exitax: RunCommand, tiny_gin: Path, copy_of_trained: Path
) -> None:
  (copy_of_trained / 'checkpoints' / '8' / 'manifest.json').unlink()
  outcome = exitax('train', f'--gin_file={tiny_gin}', f'--model_dir={copy_of_trained}')
  assert outcome.status == 0
  assert 'ignoring unfinished checkpoint' in outcome.err
  assert 'resuming from step 4' in outcome.out


def test_another_model_in_the_same_directory(
  exitax: RunCommand, tiny_gin: Path, copy_of_trained: Path
) -> None:
  before = digest(copy_of_trained / 'checkpoints')
  flags = (f'--gin_file={tiny_gin}', f'--model_dir={copy_of_trained}')
  outcome = exitax('train', *flags, '--gin.ModelConfig.mlp_dim=48')
  assert_one_line(outcome, 'mlp_dim=32, the configuration says 48')
  assert digest(copy_of_trained / 'checkpoints') == before


def test_another_tokenizer(exitax: RunCommand, copy_of_trained: Path) -> None:
  path = copy_of_trained / 'model.json'
  content = json.loads(path.read_text())
  content['tokenizer_digest'] = 'f' * 64
  path.write_text(json.dumps(content))
  for command in (('inspect',), ('generate', '--prompt=w1'), ('evaluate',)):
    outcome = exitax(*command, f'--model_dir={copy_of_trained}')
    assert_one_line(outcome, 'tokenizer')


def test_a_model_directory_that_is_none(exitax: RunCommand, tmp_path: Path) -> None:
  for command in (('inspect',), ('generate', '--prompt=w1'), ('evaluate',)):
    assert_one_line(exitax(*command, f'--model_dir={tmp_path}'), 'model.json does not exist')


def test_a_configuration_that_is_not_text(exitax: RunCommand, copy_of_trained: Path) -> None:
  (copy_of_trained / 'config.gin').write_bytes(b'\xff\xfe')
  for command in ('evaluate', 'advise', 'calibrate', 'tune-confidence'):
    outcome = exitax(command, f'--model_dir={copy_of_trained}')
    assert_one_line(outcome, 'config.gin cannot be read: it names the text')


@pytest.mark.parametrize(
  ('given', 'reason'), [(b'\xff', "can't decode byte 0xff"), (None, 'standard input is closed')]
)
def test_a_prompt_from_standard_input_that_is_none(
  exitax: RunCommand, monkeypatch: pytest.MonkeyPatch, given: bytes | None, reason: str
) -> None:
  stdin = None if given is None else io.TextIOWrapper(io.BytesIO(given), errors='surrogateescape')
  monkeypatch.setattr(sys, 'stdin', stdin)
  outcome = exitax('generate', '--model_dir=unread', '--prompt_file=-')
  assert_one_line(outcome, '--prompt_file=- cannot be read: ')
  assert reason in outcome.err


def test_a_prompt_longer_than_the_context(exitax: RunCommand, trained: Path) -> None:
  outcome = exitax('generate', f'--model_dir={trained}', f'--prompt={"x" * 80}')
  assert_one_line(outcome, 'context of 64')


@pytest.mark.parametrize('threshold', ['1.5', '-0.1'])
def test_a_threshold_out_of_range(exitax: RunCommand, trained: Path, threshold: str) -> None:
  outcome = exitax(
    'generate',
    f'--model_dir={trained}',
    '--prompt=w1',
    '--max_new_tokens=8',
    f'--threshold={threshold}',
  )
  assert_one_line(outcome, f'threshold={threshold} is outside [0, 1]')


def assert_one_line(outcome, message: str) -> None:
  """One line on standard error that holds the message, no traceback, status 2."""
  assert outcome.status == 2, outcome.err
  lines = outcome.err.strip().splitlines()
  assert len(lines) == 1, outcome.err
  assert lines[0].startswith('exitax: ')
  assert message in lines[0]
