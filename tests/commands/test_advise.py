from __future__ import annotations

import json
from pathlib import Path

from tests.commands.conftest import RunCommand

SMALL = (
  '--new_tokens=8',
  '--max_drafts=2',
  '--gin.AdviseConfig.rows=8',
  '--gin.AdviseConfig.prompts=1',
  '--gin.AdviseConfig.prompt_tokens=6',
  '--gin.AdviseConfig.part_repeats=1',
  '--gin.AdviseConfig.repeats=1',
)


def test_advice(exitax: RunCommand, trained: Path, tmp_path: Path):
  other = tmp_path / 'elsewhere'
  done = exitax('advise', f'--model_dir={trained}', f'--output={other}', '--json', *SMALL)
  assert (done.status, done.err) == (0, '')
  content = json.loads(done.out)
  assert (other / 'advice.png').stat().st_size > 10_000
  assert content['verdict']['outcome'] in ('lossless', 'threshold', 'neither')
  assert json.loads((other / 'advice.json').read_bytes())['exits'] == content['exits']


def test_mistakes(exitax: RunCommand, trained: Path, tmp_path: Path):
  for flags, message in (
    ((), 'advise needs a model: --model_dir=DIR'),
    ((f'--model_dir={tmp_path}',), 'model.json does not exist'),
    ((f'--model_dir={trained}', '--measure=luck'), "measure='luck' is not known"),
    ((f'--model_dir={trained}',), ' plus new_tokens=128 exceeds the context of 64'),
    ((f'--model_dir={trained}', '--gin.AdviseConfig.draft=1'), 'AdviseConfig has no parameter'),
  ):
    done = exitax('advise', *flags)
    assert done.status == 2
    assert message in done.err
    assert done.err.count('\n') == 1
