"""`exitax evaluate --tasks=...` end to end, on tasks that lie beside the test."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from exitax.evaluate.harness import library
from tests.commands.conftest import RunCommand

WHY = 'needs the harness extra: make install-dev'

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata: {{version: 3}}
"""
WRITE = """
task: copies
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n", "w9"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
ROLL = """
task: prose
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
"""
GROUP = """
group: everyday
task: [colours, copies]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


@pytest.fixture(scope='module')
def task_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder of tasks, with their data."""
  pytest.importorskip('lm_eval', reason=WHY)
  folder = tmp_path_factory.mktemp('tasks')
  rows = [
    {'question': f'w{i} w{i * 7 % 97}', 'choices': [' w1', ' w22', ' zz'], 'answer': i % 3}
    for i in range(6)
  ]
  data = folder / 'data.jsonl'
  data.write_text('\n'.join(json.dumps(row) for row in rows))
  for name, text in {'colours': CHOICE, 'copies': WRITE, 'prose': ROLL}.items():
    (folder / f'{name}.yaml').write_text(text.format(data=data, cache=folder / 'cache'))
  return folder


def results(folder: Path) -> tuple[dict, list[dict]]:
  with open(folder / 'tasks.csv', newline='', encoding='utf-8') as file:
    lines = list(csv.DictReader(file))
  return json.loads((folder / 'tasks.json').read_text(encoding='utf-8')), lines


def numbers(values: dict) -> dict[str, float]:
  """The metrics among what the harness says of a task."""
  found = {name: value for name, value in values.items() if isinstance(value, float)}
  assert found
  return found


def test_three_kinds_of_tasks_on_every_exit(trained: Path, task_path: Path, exitax: RunCommand):
  done = exitax(
    'evaluate',
    f'--model_dir={trained}',
    '--tasks=colours,copies,prose',
    f'--task_path={task_path}',
    '--thresholds=1,0.05,0',
  )
  assert done.status == 0, done.err
  folder = trained / 'evaluation'
  report, lines = results(folder)

  names = ['exit_1', 'exit_2', 'final', 'max_prob>1', 'max_prob>0.05', 'max_prob>0']
  assert [row['name'] for row in report['rows']] == names
  titles = ('colours acc', 'copies exact_match', 'prose bits_per_byte', 'prose byte_perplexity')
  header = next(line for line in done.out.splitlines() if 'layers/token' in line)
  assert all(title in header for title in titles)
  printed = {line.split()[0] for line in done.out.splitlines() if line.strip()}
  assert set(names) <= printed
  assert str(folder / 'tasks.csv') in done.out
  assert 'bootstrapping' not in done.out

  # The ends of the thresholds are fixed depths, whatever the kind of task.
  harness = {row['name']: row['harness']['results'] for row in report['rows']}
  layers = {row['name']: row['layers_per_token'] for row in report['rows']}
  for threshold, depth in {'max_prob>1': 'final', 'max_prob>0': 'exit_1'}.items():
    assert layers[threshold] == layers[depth]
    for task, values in harness[depth].items():
      assert numbers(harness[threshold][task]) == pytest.approx(numbers(values), rel=1e-6), task
  assert [layers[name] for name in names[:3]] == [1, 2, 3]
  assert harness['exit_1']['prose'] != harness['final']['prose']
  assert report['rows'][0]['harness']['versions']['colours'] == 3
  assert report['rows'][0]['harness']['n-samples']['prose'] == {'original': 6, 'effective': 6}
  assert report['tasks'] == ['colours', 'copies', 'prose']
  assert not any('git' in name or 'commit' in name for name in report)

  assert len(lines) == len(names) * len(titles)
  (line,) = [x for x in lines if x['row'] == 'exit_2' and x['metric'] == 'acc']
  assert float(line['value']) == harness['exit_2']['colours']['acc,none']
  assert float(line['stderr']) == harness['exit_2']['colours']['acc_stderr,none']
  assert (line['layer'], line['samples'], line['higher_is_better']) == ('2', '6', 'True')


@pytest.mark.processes
def test_a_pipe_sees_the_table_alone(
  trained: Path, task_path: Path, tmp_path: Path, subprocess_env: dict[str, str]
):
  """The libraries' own bars and warnings stay away where nobody looks."""
  run = subprocess.run(
    [
      *(sys.executable, '-m', 'exitax', 'evaluate', f'--model_dir={trained}', '--tasks=colours'),
      *(f'--task_path={task_path}', '--limit=1', '--exits=1', f'--output={tmp_path}'),
    ],
    env=subprocess_env,
    capture_output=True,
    text=True,
    check=True,
  )
  assert run.stderr == ''
  assert run.stdout.splitlines()[-3].split()[0] == 'exit_1'


def test_limits_examples_rows_and_groups(
  trained: Path, task_path: Path, tmp_path: Path, exitax: RunCommand
):
  tasks = tmp_path / 'tasks'
  shutil.copytree(task_path, tasks, ignore=shutil.ignore_patterns('cache'))
  (tasks / 'everyday.yaml').write_text(GROUP)
  done = exitax(
    'evaluate',
    f'--model_dir={trained}',
    '--tasks=everyday',
    f'--task_path={tasks}',
    '--limit=2',
    '--num_fewshot=1',
    '--exits=2,final',
    '--strategy=speculative',
    f'--output={tmp_path / "results"}',
  )
  assert done.status == 0, done.err
  report, lines = results(tmp_path / 'results')
  assert [row['name'] for row in report['rows']] == ['exit_2', 'final']
  assert [row['policy'] for row in report['rows']] == ['DeferredExit', 'Speculative']
  found = report['rows'][1]['harness']
  assert found['n-samples']['colours']['effective'] == 2
  assert found['n-shot']['colours'] == 1
  assert 'everyday acc' in done.out
  assert 'colours acc' not in done.out, 'members of a group are left to the files'
  assert {line['task'] for line in lines} >= {'everyday', 'colours'}


def test_examples_are_drawn_alike_for_every_row(
  trained: Path, task_path: Path, tmp_path: Path, exitax: RunCommand
):
  """A threshold that never exits gives the final layer's numbers only if the questions are the same."""
  done = exitax(
    'evaluate',
    f'--model_dir={trained}',
    '--tasks=colours',
    f'--task_path={task_path}',
    '--num_fewshot=1',
    '--exits=final',
    '--thresholds=1',
    '--batch_size=2',
    f'--output={tmp_path}',
  )
  assert done.status == 0, done.err
  report, _ = results(tmp_path)
  final, threshold = (row['harness']['results'] for row in report['rows'])
  assert threshold == final


TEMPLATE = '{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}'


@pytest.mark.parametrize(
  ('template', 'status'), [(TEMPLATE, 0), ("{{ raise_exception('not today') }}", 2)]
)
def test_questions_as_a_chat(
  trained: Path, task_path: Path, tmp_path: Path, exitax: RunCommand, template: str, status: int
):
  model_dir = tmp_path / 'model'
  shutil.copytree(trained, model_dir, ignore=shutil.ignore_patterns('evaluation'))
  (model_dir / 'tokenizer' / 'chat_template.jinja').write_text(template)
  done = exitax(
    'evaluate',
    f'--model_dir={model_dir}',
    '--tasks=colours',
    f'--task_path={task_path}',
    '--exits=final',
    '--apply_chat_template',
  )
  assert done.status == status, done.err
  if status:
    assert 'the chat template refuses: not today' in done.err
  else:
    report, _ = results(model_dir / 'evaluation')
    assert report['chat_template'] is True


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--tasks=colors'], "no task 'colors': did you mean colours"),
    (['--tasks=colours,'], '--tasks has an empty name'),
    (['--tasks=colours', '--exits=9'], "'9' is no exit of this model: choose all, or 1, 2, final"),
    (['--tasks=colours', '--thresholds=high'], '--thresholds=high are not numbers'),
    (['--tasks=colours', '--thresholds=2'], 'threshold=2.0 is outside [0, 1]'),
    (['--tasks=colours', '--limit=0'], 'limit=0 must be at least 1'),
    (['--tasks=colours', '--num_fewshot=-1'], 'num_fewshot=-1 must be at least 0'),
    (['--tasks=colours', '--apply_chat_template'], 'has no chat template'),
    (['--tasks=broken'], 'tasks broken cannot be loaded'),
    (['--limit=3'], '--limit is for benchmarks: add --tasks=NAME'),
  ],
)
def test_mistakes_are_one_line(
  trained: Path, task_path: Path, tmp_path: Path, exitax: RunCommand, flags, message
):
  tasks = task_path
  if 'broken' in flags[0]:
    text = CHOICE.replace('colours', 'broken')
    tasks = tmp_path
    data = tmp_path / 'absent.jsonl'
    (tmp_path / 'broken.yaml').write_text(text.format(data=data, cache=tmp_path / 'cache'))
  where = [] if 'limit=3' in flags[0] else [f'--task_path={tasks}']
  failed = exitax('evaluate', f'--model_dir={trained}', *flags, *where)
  assert failed.status == 2, failed.err
  assert message in failed.err
  assert failed.err.count('\n') == 1
  assert failed.out == ''


def test_a_folder_without_tasks_is_refused(trained: Path, tmp_path: Path, exitax: RunCommand):
  pytest.importorskip('lm_eval', reason=WHY)
  for folder, message in {
    tmp_path: f'task_path={tmp_path} has no .yaml file',
    tmp_path / 'absent': f'task_path={tmp_path / "absent"} is no folder',
  }.items():
    failed = exitax(
      'evaluate', f'--model_dir={trained}', '--tasks=colours', f'--task_path={folder}'
    )
    assert failed.status == 2
    assert message in failed.err
    assert failed.err.count('\n') == 1


def test_without_the_library_it_says_what_to_install(
  trained: Path, exitax: RunCommand, monkeypatch: pytest.MonkeyPatch
):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  failed = exitax('evaluate', f'--model_dir={trained}', '--tasks=hellaswag')
  assert failed.status == 2
  assert failed.err == (
    "exitax: --tasks needs lm-evaluation-harness: pip install 'exitax[harness]', or make install-dev\n"
  )


def test_a_library_that_is_too_old_is_named(
  trained: Path, exitax: RunCommand, monkeypatch: pytest.MonkeyPatch
):
  pytest.importorskip('lm_eval', reason=WHY)
  monkeypatch.setattr('importlib.metadata.version', lambda name: '0.4.9.1')
  failed = exitax('evaluate', f'--model_dir={trained}', '--tasks=hellaswag')
  assert failed.status == 2
  assert '--tasks needs lm_eval 0.4.13 or later, and 0.4.9.1 is installed' in failed.err
  assert failed.err.count('\n') == 1


def test_the_oldest_library_is_that_of_the_project(repository: Path):
  extras = tomllib.loads((repository / 'pyproject.toml').read_text('utf-8'))['project']
  (line,) = extras['optional-dependencies']['harness']
  assert f'>={".".join(map(str, library._OLDEST))},' in line


def test_the_task_of_the_guide_runs(
  repository: Path,
  trained: Path,
  tmp_path: Path,
  exitax: RunCommand,
  monkeypatch: pytest.MonkeyPatch,
):
  pytest.importorskip('lm_eval', reason=WHY)
  monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', tmp_path / 'cache')
  guide = (repository / 'docs' / 'howto' / 'benchmarks.md').read_text(encoding='utf-8')
  (task,) = re.findall(r'```yaml\n(.*?)```', guide, re.DOTALL)
  (tmp_path / 'tasks').mkdir()
  (tmp_path / 'tasks' / 'capitals.yaml').write_text(task)
  record = {'question': 'France:', 'choices': [' Paris', ' Lyon'], 'answer': 0}
  (tmp_path / 'tasks' / 'capitals.jsonl').write_text(json.dumps(record))
  monkeypatch.chdir(tmp_path)
  command = re.search(r'^\$ exitax (.*--tasks=capitals.*)$', guide, re.MULTILINE)
  argv = command.group(1).replace('runs/quickstart', str(trained)).split()
  done = exitax(*argv, f'--output={tmp_path}')
  assert done.status == 0, done.err
  assert 'capitals acc' in done.out
