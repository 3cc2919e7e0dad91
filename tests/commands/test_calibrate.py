from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from exitax.checkpoint import load_certificate
from tests.commands.conftest import RunCommand

SMALL = (
  '--prompt_tokens=6',
  '--max_new_tokens=4',
  '--examples=24',
  '--gin.CalibrateConfig.thresholds=(0.9, 0.5, 0.0)',
)


@pytest.fixture
def model_dir(trained: Path, tmp_path: Path) -> Path:
  return shutil.copytree(trained, tmp_path / 'model')


def test_a_certificate_is_written_and_used(exitax: RunCommand, model_dir: Path):
  done = exitax('calibrate', f'--model_dir={model_dir}', '--risk=0.2', *SMALL)
  assert (done.status, done.err) == (0, '')
  assert 'Certified: threshold ' in done.out
  assert (model_dir / 'calibration' / 'calibration.png').stat().st_size > 10_000
  certificate = load_certificate(model_dir, step=8, exits=(1, 2))
  assert certificate.threshold in (0.9, 0.5, 0.0)
  assert certificate.examples == 24

  ask = ('generate', f'--model_dir={model_dir}', '--prompt=w1', '--json', '--max_new_tokens=4')
  certified = exitax(*ask, '--threshold=certified')
  assert (certified.status, certified.err) == (0, '')
  same = exitax(*ask, f'--threshold={certificate.threshold}')
  assert json.loads(certified.out) == json.loads(same.out)
  gin = exitax(*ask, "--gin.GenerateConfig.threshold='certified'")
  assert json.loads(gin.out) == json.loads(same.out)

  for more, message in (
    ('--max_new_tokens=5', 'for at most 4 new tokens'),
    ('--temperature=0.5', 'is for greedy decoding'),
    ('--confidence=margin', 'is for max_prob; leave it out'),
    ('--weights=int8', 'is for weights=compute; leave it out'),
    ('--step=4', 'is for the checkpoint of step 8'),
    ('--exits=none', 'is for exits after layers 1,2, those in use are none: use --exits=1,2'),
  ):
    refused = exitax(*ask, '--threshold=certified', more)
    assert refused.status == 2
    assert message in refused.err
    assert refused.err.count('\n') == 1


def test_a_refusal_writes_no_certificate(exitax: RunCommand, model_dir: Path):
  done = exitax('calibrate', f'--model_dir={model_dir}', '--risk=0.001', *SMALL)
  assert (done.status, done.err) == (3, '')
  assert 'Not certified: at threshold 0.9' in done.out
  assert '2995 examples, 2971 more' in done.out  # 0.999^2995 <= 0.05
  assert not (model_dir / 'certificate.json').exists()
  assert (model_dir / 'calibration' / 'calibration.png').exists()
  asked = exitax('generate', f'--model_dir={model_dir}', '--prompt=w', '--threshold=certified')
  assert asked.status == 2
  assert 'has no certificate: make one with `exitax calibrate' in asked.err


def test_json_and_prompts_of_ones_own(exitax: RunCommand, model_dir: Path, tmp_path: Path):
  prompts = tmp_path / 'mine.jsonl'
  prompts.write_text(''.join(json.dumps({'prompt': f'w{i}'}) + '\n' for i in range(20)))
  done = exitax(
    'calibrate',
    f'--model_dir={model_dir}',
    f'--prompt_file={prompts}',
    '--json',
    '--method=crc',
    '--metric=exact_match',
    '--risk=0.3',
    *SMALL,
  )
  content = json.loads(done.out)
  assert done.status == (0 if content['decision']['threshold'] is not None else 3)
  assert content['population'] == '20 prompts of mine.jsonl'
  assert content['config']['metric'] == 'exact_match'


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--metric=bleu',), "metric='bleu' is not known"),
    (('--risk=0',), 'risk=0.0 is outside (0, 1)'),
    (('--seed=-1',), 'seed=-1 must be at least 0'),
    (('--strategy=speculative',), 'gives the tokens of full depth: nothing to certify'),
    (('--prompt_file=absent.txt',), '--prompt_file=absent.txt cannot be read'),
    (('--prompt_tokens=60',), 'prompt_tokens=60 plus max_new_tokens=64 exceeds the context of 64'),
    (('--gin.CalibrateConfig.risks=0.1',), 'did you mean risk?'),
  ],
)
def test_mistakes(exitax: RunCommand, model_dir: Path, flags, message):
  done = exitax('calibrate', f'--model_dir={model_dir}', *flags)
  assert done.status == 2
  assert message in done.err
  assert done.err.count('\n') == 1
  assert not (model_dir / 'certificate.json').exists()


def test_it_needs_a_model(exitax: RunCommand, tmp_path: Path):
  assert 'calibrate needs a model: --model_dir=DIR' in exitax('calibrate').err
  done = exitax('calibrate', f'--model_dir={tmp_path}')
  assert done.status == 2
  assert 'model.json does not exist' in done.err
