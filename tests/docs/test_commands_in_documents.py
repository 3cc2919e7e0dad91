"""Commands in README, guides and gin headers are run as written, on a model made small."""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from exitax.commands.main import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]
GIN_FILES = sorted((ROOT / 'gin').rglob('*.gin'))

# Appended to every training command: the same run, small.
SMALL = (
  '--gin.TRAIN_STEPS=2',
  '--gin.BATCH_SIZE=8',
  "--gin.TASK_FEATURE_LENGTHS={'targets': 32}",
  '--gin.MIXTURE_OR_TASK_NAME=@Task()',
  "--gin.Task.name='some_modules'",
  '--gin.Task.source=@PythonLibrarySource()',
  '--gin.PythonLibrarySource.max_files=30',
  '--gin.VOCAB_SIZE=300',
  '--gin.ModelConfig.embed_dim=24',
  '--gin.ModelConfig.num_heads=6',
  '--gin.ModelConfig.num_kv_heads=2',
  '--gin.ModelConfig.mlp_dim=16',
  # Compiles one layer in place of twelve.
  "--gin.ModelConfig.remat='full'",
  '--gin.LoopConfig.eval_rows=8',
)
# The backbone has its own sizes and tokenizer.
SMALL_TUNING = tuple(
  flag for flag in SMALL if not flag.startswith(('--gin.ModelConfig', '--gin.VOCAB_SIZE'))
)
LORA_COMMAND = """train --gin_file=gin/runs/lora.gin --gin.BACKBONE="'runs/quickstart'" """
SMALL_EVALUATION = (
  '--gin.EvaluateConfig.rows=8',
  '--gin.EvaluateConfig.speed_prompts=1',
  '--gin.EvaluateConfig.speed_new_tokens=4',
  '--gin.EvaluateConfig.speed_repeats=1',
)

SMALL_GROUPS = (
  '--prompts=2',
  '--thinkers=2',
  '--tokens=4',
  '--gin.GroupEvaluateConfig.seeds=1',
  '--gin.GroupEvaluateConfig.lags=(1,)',
  '--gin.GroupEvaluateConfig.speed_repeats=1',
)

SMALL_ADVICE = (
  '--new_tokens=4',
  '--gin.AdviseConfig.rows=8',
  '--gin.AdviseConfig.prompts=1',
  '--gin.AdviseConfig.max_drafts=2',
  '--gin.AdviseConfig.part_repeats=1',
  '--gin.AdviseConfig.repeats=1',
)
# Lenient, so that a model of two steps gets a certificate.
SMALL_CALIBRATION = (
  '--examples=8',
  '--prompt_tokens=4',
  '--max_new_tokens=4',
  '--risk=0.9',
  '--confidence=0.5',
)


TESTED = (
  'train',
  'tune-exits',
  'evaluate',
  'tune-confidence',
  'calibrate',
  'advise',
  'generate',
  'think',
  'convert',
  'inspect',
  'plan',
  'serve',
)


def exitax_commands(text: str) -> list[str]:
  """Command lines of exitax in a document or in the comments of a gin file."""
  joined = re.sub(r'\\\n#?\s*', '', text)
  lines = (line.lstrip('# ').strip() for line in joined.splitlines())
  found = [re.match(rf'(?:\.venv/bin/)?exitax ((?:{"|".join(TESTED)}) .*)', x) for x in lines]
  return [match.group(1) for match in found if match]


def documented_commands() -> list[str]:
  """All of them, in documents and gin headers."""
  files = (*DOCUMENTS, *GIN_FILES)
  return [command for path in files for command in exitax_commands(path.read_text('utf-8'))]


@pytest.fixture(scope='module')
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Where `runs/` of the documents is; `runs/quickstart` has been trained."""
  runs = tmp_path_factory.mktemp('documents')
  run_command('train --gin_file=gin/runs/quickstart.gin --model_dir=runs/quickstart', runs)
  # The packaged one is longer than the small model's context.
  (runs / 'think.toml').write_text('prompt = "{problem}"\nheader = "|{thinker}"\nanswer = "="\n')
  (runs / 'prompts.jsonl').write_text('{"prompt": "def "}\n{"prompt": "import "}\n' * 4)
  return runs


def placed(command: str, runs: Path) -> list[str]:
  """The arguments of a documented command, with directories below `runs`."""
  argv = shlex.split(command.replace('runs/quickstart.gin', 'RUN_FILE'))
  argv = [re.sub(r'\bruns/', f'{runs}/', part) for part in argv]
  argv = [part.replace('RUN_FILE', 'runs/quickstart.gin') for part in argv]
  return [part.replace(f'gin/{runs}', 'gin/runs').replace('max_new_tokens=64', '') for part in argv]


@contextlib.contextmanager
def serving(
  command: str, runs: Path, env: dict[str, str], *, max_thinkers: int = 1
) -> Iterator[str]:
  """The address at which a documented server answers; it must end well when told to."""
  template = runs / 'think.toml'
  argv = [*placed(command, runs), '--port=0', '--num_slots=4', f'--think_template={template}']
  argv += [f'--max_thinkers={max_thinkers}']
  with subprocess.Popen(
    [sys.executable, '-m', 'exitax', *argv], stdout=subprocess.PIPE, text=True, env=env
  ) as server:
    try:
      lines = iter(server.stdout.readline, '')
      address = next(line for line in lines if line.startswith('serving at ')).split()[2]
      yield address
      server.send_signal(signal.SIGTERM)
      assert server.wait(timeout=60) == 0, command
    finally:
      server.kill()


def _make_source(command: str, runs: Path) -> None:
  """The folder that a conversion reads, which another command of the same page writes."""
  way, source, out = placed(command, runs)[1:4]
  shutil.rmtree(out, ignore_errors=True)
  if way == 'from-hf' and not Path(source).exists():
    run_command(f'convert to-hf runs/quickstart {source}', runs)
  elif way in ('to-peft', 'merge') and not Path(source).exists():
    run_command(f'{LORA_COMMAND} --model_dir={source}', runs)


def _make_backbone(command: str, runs: Path) -> None:
  """The model that a command trains on or evaluates, which another command of the same page trains."""
  read = r'BACKBONE=\S*|--backbone=' + ('|--model_dir=' if command.startswith('evaluate') else '')
  for name in re.findall(rf'(?:{read})runs/(\w+)', command):
    if not (runs / name).exists():
      run_command(f'train --gin_file=gin/runs/{name}.gin --model_dir=runs/{name}', runs)


def run_command(command: str, runs: Path) -> None:
  """Runs a documented command with directories below `runs` and small sizes."""
  argv = placed(command, runs)
  _make_backbone(command, runs)
  if argv[0] == 'train':
    argv += SMALL_TUNING if 'BACKBONE' in command else SMALL
  elif argv[0] == 'tune-exits':
    argv += SMALL_TUNING
  elif argv[0] == 'evaluate':
    argv += SMALL_GROUPS if '--task=' in command else SMALL_EVALUATION
  elif argv[0] == 'advise':
    argv += SMALL_ADVICE
  elif argv[0] == 'calibrate':
    argv += SMALL_CALIBRATION
  elif argv[0] == 'generate':
    argv += ['--max_new_tokens=4']
    _certify_if_asked(command, runs)
  elif argv[0] == 'think':
    argv += ['--tokens=4', '--answer_tokens=4', f'--template={runs / "think.toml"}']
  elif argv[0] == 'convert':
    _make_source(command, runs)
  elif argv[0] == 'plan':
    argv += ['--estimate_only']  # Compiling a model of that size takes minutes.
  with pytest.raises(SystemExit) as stop:
    main(argv)
  assert not stop.value.code, command


def _certify_if_asked(command: str, runs: Path) -> None:
  if 'certified' in command and not (runs / 'quickstart' / 'certificate.json').exists():
    run_command('calibrate --model_dir=runs/quickstart', runs)


def _documented() -> list[Any]:
  """Every command once, under the first place that has it; `runs/mine` is `runs/quickstart`."""
  found: dict[str, str] = {}
  for path in (*DOCUMENTS, *GIN_FILES):
    for i, command in enumerate(exitax_commands(path.read_text(encoding='utf-8'))):
      if '_medium.gin' in command:
        continue  # Made small it is its twin of that name, which is run.
      same = re.sub(r'runs/mine\b(?!-)', 'runs/quickstart', command)
      trains = '--model_dir=runs/mine' in command and command.startswith(('train', 'tune-exits'))
      found.setdefault(command if trains else same, f'{path.name}-{i}')
  return [pytest.param(command, id=place) for command, place in found.items()]


DOCUMENTED = _documented()


@pytest.mark.slow
@pytest.mark.parametrize('command', DOCUMENTED)
def test_documented_command(
  command: str, model_dirs: Path, monkeypatch: pytest.MonkeyPatch, subprocess_env: dict[str, str]
) -> None:
  monkeypatch.chdir(ROOT)
  if command.startswith('serve'):
    _certify_if_asked(command, model_dirs)
    with serving(command.replace('runs/mine', 'runs/quickstart'), model_dirs, subprocess_env):
      return
  if (
    command.startswith(('evaluate', 'advise', 'calibrate', 'generate', 'think', 'convert'))
    or '--model_dir=runs/mine' not in command
  ):
    run_command(re.sub(r'runs/mine\b(?!-)', 'runs/quickstart', command), model_dirs)
  else:
    run_command(command.replace('runs/mine', f'runs/{abs(hash(command))}'), model_dirs)


def test_commands_are_found() -> None:
  assert len(DOCUMENTED) >= 10


@pytest.mark.slow
def test_python_in_the_readme(model_dirs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
  assert blocks
  for block in blocks:
    exec(block.replace('runs/quickstart', str(model_dirs / 'quickstart')), {})


@pytest.mark.slow
def test_requests_of_the_guide_to_serving(
  model_dirs: Path, monkeypatch: pytest.MonkeyPatch, subprocess_env: dict[str, str]
) -> None:
  monkeypatch.chdir(ROOT)
  guide = (ROOT / 'docs' / 'howto' / 'serve.md').read_text(encoding='utf-8')
  (command,) = exitax_commands(guide)
  requests = re.findall(r'^curl .*', guide, re.MULTILINE)
  blocks = re.findall(r'```python\n(.*?)```', guide, re.DOTALL)
  assert requests
  assert blocks
  with serving(command, model_dirs, subprocess_env, max_thinkers=4) as address:
    for request in requests:
      argv = shlex.split(request.replace('http://127.0.0.1:8000', address))
      subprocess.run([*argv, '--fail', '--output', '/dev/null'], check=True)
    for block in blocks:
      exec(block.replace('http://127.0.0.1:8000', address), {})


def test_links_lead_somewhere() -> None:
  for path in DOCUMENTS:
    for target in re.findall(r'\]\(([^)#:]+)(?:#[^)]*)?\)', path.read_text(encoding='utf-8')):
      assert (path.parent / target).exists(), f'{path.name} links to {target}'


def test_make_targets_in_the_readme_exist() -> None:
  makefile = (ROOT / 'Makefile').read_text()
  for target in re.findall(r'^make ([a-z-]+)', (ROOT / 'README.md').read_text(), re.MULTILINE):
    assert re.search(rf'^{target}:', makefile, re.MULTILINE), target


@pytest.mark.parametrize('path', GIN_FILES, ids=lambda path: str(path.relative_to(ROOT / 'gin')))
def test_gin_file_is_valid(
  path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
  """Every file parses and builds: a run by itself, other files on top of the quickstart."""
  name = str(path.relative_to(ROOT / 'gin'))
  files = [name] if name == 'runs/quickstart.gin' else ['runs/quickstart.gin', name]
  if name.startswith('exits/quarter') or name == 'models/small.gin':
    files = ['runs/quickstart.gin', 'models/small.gin', 'exits/quarter_half.gin']
  pod = re.fullmatch(r'parallel/v\w+?_\dx\dx?\d?_(ee_\w+)\.gin', name)
  if pod:
    files = ['runs/quickstart.gin', f'models/{pod.group(1)}.gin', name]
  required = [
    '--gin.TRAIN_STEPS=2',
    "--gin.MODEL_DIR='unused'",
    "--gin.MIXTURE_OR_TASK_NAME='python_library'",
    # A file for one device, on the eight of the tests.
    *(['--gin.MeshConfig.data=-1'] if name == 'parallel/single.gin' or pod else []),
    # Files for slices of a pod, likewise.
    *(['--gin.MeshConfig.tensor=1'] if pod else []),
  ]
  if 'BACKBONE' in path.read_text(encoding='utf-8'):
    # A run on a model that is there: its shapes are that model's.
    files = [name]
    required.append(f"--gin.BACKBONE='{request.getfixturevalue('model_dirs') / 'quickstart'}'")
  with pytest.raises(SystemExit) as stop:
    main(['train', '--dry_run', *(f'--gin_file={file}' for file in files), *required])
  assert not stop.value.code, capsys.readouterr().err
