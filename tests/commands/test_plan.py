"""`exitax plan` as a user types it."""

from __future__ import annotations

import json

import pytest

from exitax.parallel import has_tpu_compiler

TINY = (
  'plan',
  '--gin_file=gin/models/tiny.gin',
  '--gin_file=gin/exits/third_two_thirds.gin',
  '--gin.VOCAB_SIZE=512',
  "--gin.TASK_FEATURE_LENGTHS={'targets': 32}",
  '--gin.BATCH_SIZE=8',
)
STAGES = ('--gin.MeshConfig.pipeline=2', '--gin.PipelineConfig.num_microbatches=2')


@pytest.mark.slow
def test_a_plan_is_printed_and_written(exitax, tmp_path):
  found = exitax(*TINY, *STAGES, '--chip=TPU v5e', f'--output_dir={tmp_path}')
  assert found.status == 0, found.err
  for wanted in ('fits: 0% of 16.0 GiB', 'compiled for cpu', 'stage 1', 'MFU, at most'):
    assert wanted in found.out
  written = json.loads((tmp_path / 'plan.json').read_text())
  assert written['fits'] is True
  assert written['mesh'] == {'data': 4, 'pipeline': 2, 'tensor': 1}
  assert written['compiled']['collectives']
  assert (tmp_path / 'schedule.png').read_bytes().startswith(b'\x89PNG')
  layout = (tmp_path / 'layout.gin').read_text()
  assert 'MeshConfig.pipeline = 2' in layout
  assert 'MeshConfig.data = 4' in layout  # What -1 stood for.


def test_arithmetic_alone_takes_no_compiler(exitax):
  found = exitax(*TINY, '--estimate_only')
  assert found.status == 0, found.err
  assert 'compiled' not in found.out
  assert 'no data sheet of this device' in found.out


def test_a_search(exitax):
  found = exitax(*TINY, '--chip=TPU v5e', '--search', '--estimate_only')
  assert found.status == 0, found.err
  assert 'layouts tried, fastest that fit first' in found.out
  assert ' 1.' in found.out
  assert 'compiled' not in found.out


def test_a_search_by_arithmetic_writes_its_best_too(exitax, tmp_path):
  (tmp_path / 'schedule.png').write_bytes(b'of an earlier plan')
  found = exitax(
    *TINY,
    '--chip=TPU v5e',
    '--search',
    '--estimate_only',
    '--gin.ModelConfig.num_layers=1',  # No stages, and so no picture.
    '--gin.exits.layers=()',
    '--gin.exit_weights.start=()',
    f'--output_dir={tmp_path}',
  )
  assert found.status == 0, found.err
  assert 'best: data=' in found.out
  assert (tmp_path / 'layout.gin').read_text() in found.out
  assert sorted(path.name for path in tmp_path.iterdir()) == ['layout.gin', 'plan.json']


def test_a_search_says_that_nothing_fits(exitax, tmp_path):
  found = exitax(
    'plan',
    '--gin_file=gin/models/ee_30b.gin',
    '--chip=TPU v5e',
    '--search',
    '--estimate_only',
    f'--output_dir={tmp_path}',
  )
  assert found.status == 1
  assert 'layouts tried, none within 70% of 16.0 GiB, smallest first' in found.out
  assert 'nothing fits by estimate: ' in found.out
  assert 'GiB more than the 16.0 GiB there are' in found.out
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_search_ends_with_a_layout_to_paste(exitax, tmp_path):
  found = exitax(
    *TINY, '--chip=TPU v5e', '--search', '--num_compiled=1', f'--output_dir={tmp_path}'
  )
  assert found.status == 0, found.err
  assert 'best: data=' in found.out
  assert (tmp_path / 'layout.gin').read_text() in found.out


@pytest.mark.skipif(
  not has_tpu_compiler(), reason='the TPU compiler is not installed: pip install "exitax[plan]"'
)
def test_what_cannot_fit_has_status_1_and_names_what_would(exitax):
  """By arithmetic: 30 billion parameters on four chips of 16 GiB, then a batch that is too large."""
  found = exitax(
    'plan',
    '--gin_file=gin/models/ee_30b.gin',
    '--topology=v5e:2x2',
    '--estimate_only',
    '--gin.BATCH_SIZE=8',
  )
  assert found.status == 1
  assert 'does not fit: ' in found.out
  assert 'nothing fits by estimate: take v5e:' in found.out
  assert '\nthe smallest: data=' in found.out
  found = exitax(
    'plan',
    '--gin_file=gin/models/ee_1p3b.gin',
    '--topology=v5e:4x4',
    '--estimate_only',
    '--gin.BATCH_SIZE=256',
    "--gin.TASK_FEATURE_LENGTHS={'targets': 2048}",
  )
  assert found.status == 1
  assert 'would fit by estimate:\n  data=' in found.out


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (('plan',), 'plan needs a model: --gin_file='),
    ((*TINY, '--topology=h100'), "topology 'h100' is unknown: write GENERATION:SHAPE"),
    ((*TINY, '--topology=v5e:4x4', '--emulate_devices=8'), 'both say which devices: give one'),
    ((*TINY, '--chip=abacus'), "--chip='abacus' is unknown: choose TPU v4"),
    ((*TINY, '--search', '--num_compiled=-1'), '--num_compiled=-1 must be 0 or more'),
    ((*TINY, '--search'), 'a search needs the data sheet of 8 x cpu'),
    ((*TINY, '--gin.MeshConfig.pipeline=4', '--gin.BATCH_SIZE=9'), 'does not divide the 9 rows'),
    ((*TINY, '--gin.MeshConfig.pipeline=8'), 'pipeline=8 is more than num_layers=6'),
    ((*TINY, '--gin.MeshConfig.data=3'), 'does not match 8 devices'),
    ((*TINY, '--topology=v5e:4x4', '--chip=TPU v4'), 'both say which chip: give one'),
    ((*TINY, '--gin.BATCH_SIZE=0'), 'batch_size=0 must be at least 1'),
    (
      (*TINY, '--gin.BATCH_SIZE=12'),
      'data=8 does not divide batch_size=12: choose a multiple of 8',
    ),
    ((*TINY, "--gin.TASK_FEATURE_LENGTHS={'targets': 0}"), 'length=0 must be at least 1'),
    (
      (*TINY, '--output_dir=pyproject.toml/x'),
      '--output_dir=pyproject.toml/x cannot be written to',
    ),
  ],
)
def test_mistakes(exitax, flags, message):
  found = exitax(*flags)
  assert found.status == 2
  assert message in found.err
  assert len(found.err.strip().splitlines()) == 1
