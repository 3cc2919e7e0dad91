"""Groups of thinkers from the command line of `exitax evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.commands.conftest import RunCommand

# What fits the small model's context.
SMALL = (
  '--gin.GroupDataConfig.tasks=(@EnumerationTask(),)',
  '--gin.EnumerationTask.num_items=6',
  '--gin.GroupMix.thinkers=(1,2)',
  '--gin.GroupMix.slots=2',
  '--gin.GroupMix.slot_width=8',
  '--gin.GroupEvaluateConfig.lags=(1,)',
  '--gin.GroupEvaluateConfig.seeds=1',
  '--gin.GroupEvaluateConfig.speed_steps=0',
)


def test_a_task_with_baselines(exitax: RunCommand, trained: Path, tmp_path: Path):
  done = exitax(
    'evaluate',
    f'--model_dir={trained}',
    '--task=enumeration',
    '--baselines',
    '--thinkers=2',
    '--prompts=3',
    f'--output={tmp_path / "out"}',
    *SMALL,
  )
  assert (done.status, done.err) == (0, '')
  assert 'num_items=6' in done.out and 'written: ' in done.out
  report = json.loads((tmp_path / 'out' / 'group_enumeration.json').read_text())
  names = [curve['way'] for curve in report['curves']]
  assert names == ['chain_of_thought', 'independent', 'group_think', 'cross_mask_off', 'lag']
  assert report['problems'] == 3 and report['tokens'] == 6  # A slot of 8 less a header of 2.
  assert {path.suffix for path in (tmp_path / 'out').iterdir()} == {'.json', '.csv', '.png'}


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--task=knitting'], "no task 'knitting' for groups: choose enumeration, floyd_warshall"),
    (['--task=enumeration', '--tasks=arc_easy'], '--task is for groups of thinkers, --tasks for'),
    (['--task=enumeration', '--limit=3'], '--limit is for benchmarks: add --tasks=NAME'),
    (['--baselines'], '--baselines is for groups of thinkers: add --task=NAME'),
    (['--thinkers=2'], '--thinkers is for groups of thinkers: add --task=NAME'),
    (['--task=enumeration', '--thinkers=two'], '--thinkers=two are not numbers with commas'),
    (['--task=enumeration', '--thinkers=1'], r'thinkers=(1,) must be numbers from 2 to 26'),
    (['--task=enumeration', '--thinkers=4'], 'thinkers=4 are more than the 2 slots'),
    (['--task=enumeration', '--thinkers=2', '--tokens=7'], 'slot_width=8 is below the 9 tokens'),
    (
      ['--task=enumeration', '--thinkers=2', '--gin.EnumerationTask.num_items=60'],
      'exceed the context of 64',
    ),
  ],
)
def test_bad_input(exitax: RunCommand, trained: Path, flags: list[str], words: str):
  done = exitax('evaluate', f'--model_dir={trained}', *SMALL, *flags)
  assert done.status == 2
  assert words in done.err
  assert done.err.count('\n') == 1
