"""`exitax generate` with a mesh from gin."""

import json

import pytest

COMMON = ('--prompt=w1 w2', '--prompt=w7', '--max_new_tokens=8', '--json')


def _texts(outcome):
  assert outcome.status == 0, outcome.err
  return [json.loads(line)['tokens'] for line in outcome.out.splitlines()]


def test_stages_write_what_one_device_writes(exitax, trained):
  command = ('generate', f'--model_dir={trained}', *COMMON, '--threshold=0.02')
  alone = _texts(exitax(*command))
  stages = ('--strategy=pipeline', '--gin.MeshConfig.pipeline=3')
  assert _texts(exitax(*command, *stages)) == alone
  assert _texts(exitax(*command, *stages, '--gin.MeshConfig.data=2')) == alone
  assert _texts(exitax(*command, '--strategy=pipeline')) == alone  # One stage.
  assert _texts(exitax(*command, '--gin.MeshConfig.tensor=2')) == alone


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('--gin.MeshConfig.pipeline=4',), 'pipeline=4 is more than num_layers=3'),
    (('--gin.MeshConfig.pipeline=9',), 'needs 9 devices and there are 8'),
    (('--gin.MeshConfig.pipeline=2', '--gin.MeshConfig.tensor=2'), 'mesh tensor=2'),
    (('--gin.MeshConfig.pipeline=0',), 'mesh pipeline=0: choose 1 or more'),
  ],
)
def test_meshes_that_do_not_fit_are_one_line(exitax, trained, flags, message):
  outcome = exitax(
    'generate', f'--model_dir={trained}', *COMMON, '--strategy=pipeline', '--threshold=0.5', *flags
  )
  assert outcome.status != 0
  assert message in outcome.err
  assert len(outcome.err.strip().splitlines()) == 1
