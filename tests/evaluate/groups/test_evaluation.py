"""All ways of thinking on the same problems, against texts that are decoded one problem at a time."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from exitax.data import ByteTokenizer, GroupMix
from exitax.data.group_tasks import EnumerationTask, TreeSumTask, union_coverage
from exitax.decode import FullDepth, Sampler, Sees, ThinkConfig, think
from exitax.errors import UserError
from exitax.evaluate.groups import (
  CHAIN,
  GROUP,
  INDEPENDENT,
  LAG,
  MASK_OFF,
  GroupEvaluateConfig,
  evaluate_groups,
  ideal_coverage,
  render_groups,
  write_group_report,
)
from exitax.evaluate.groups.report import to_csv
from exitax.evaluate.groups.rollouts import GroupWriter, pose
from exitax.parallel import ShardingRules, use
from tests.evaluate.conftest import make_loaded

TASK = EnumerationTask(num_items=40)  # A good part of all bytes: random texts score too.
MIX = GroupMix(thinkers=(1, 2, 3), slots=3, slot_width=10)
CONFIG = GroupEvaluateConfig(
  thinkers=(2, 3), prompts=3, seeds=2, baselines=True, lags=(2,), texts=4, speed_steps=2
)


@pytest.fixture(scope='module')
def model(one_device):
  """Random."""
  return make_loaded(ByteTokenizer(), one_device, exits=(), max_length=128)


@pytest.fixture(scope='module')
def report(model, one_device):
  with use(one_device, ShardingRules()):
    return evaluate_groups(model, TASK, MIX, CONFIG, mesh=one_device)


def test_every_way_is_measured(report):
  ways = [(curve.way, curve.thinkers, curve.lag) for curve in report.curves]
  of_size = [(INDEPENDENT, None), (GROUP, 0), (MASK_OFF, None), (LAG, 2)]
  assert ways == [(CHAIN, 1, None), *((way, n, lag) for n in (2, 3) for way, lag in of_size)]
  assert report.problems == 6 and report.tokens == 8  # Slots of 10 hold a header of 2.
  assert report.sizes == (2, 3) and [gain.thinkers for gain in report.gains] == [2, 3]
  for curve in report.curves:
    assert len(curve.coverage) == len(curve.total_tokens) == 9
    assert all(low <= mean <= high for low, mean, high in zip(*bands(curve), strict=True))
    assert curve.step_ms is not None and curve.step_ms > 0
    assert curve.total_tokens[-1] <= 8 * curve.thinkers
  chosen = report.curve(GROUP, 2)
  np.testing.assert_allclose(chosen.theory, ideal_coverage(40, 2, 8))
  assert report.curve(LAG, 3, lag=2).theory is None
  with pytest.raises(KeyError, match='lag 2 4 was not measured'):
    report.curve(LAG, 4, lag=2)


def bands(curve):
  return curve.low, curve.coverage, curve.high


@pytest.mark.parametrize(('way', 'sees'), [(GROUP, 'full'), (MASK_OFF, 'none'), (LAG, 'lag:2')])
def test_curves_are_of_the_texts_that_groups_write(model, report, one_device, way, sees):
  """One problem at a time, through `think`; the evaluation has them in batches of several."""
  expected = []
  with use(one_device, ShardingRules()):
    writer = make_writer(model)
    for seed in range(2):
      for item in pose(TASK, MIX, model.tokenizer, thinkers=3, count=3, seed=seed):
        group = writer.group(item, range(2), Sees.parse(sees))
        ((one, two),) = think(
          model.model, model.params, [group], THINK, stop_tokens=model.tokenizer.stop_ids
        )
        written = [decoded(model, text) for text in (one, two)]
        expected.append([union_coverage(item.problem, written, k) for k in range(9)])
  found = report.curve(way, 2, lag=2)
  assert np.mean(expected) > 0.01
  np.testing.assert_allclose(found.coverage, np.mean(expected, axis=0), atol=1e-12)


THINK = ThinkConfig(max_new_tokens=8, slot_width=10)


def make_writer(model):
  return GroupWriter(
    model, policy=FullDepth(), sampler=Sampler(temperature=1.0), config=THINK, texts=4
  )


def decoded(model, completion) -> str:
  # Tokens that are no text take a place each, as they do in a curve.
  return ''.join(model.tokenizer.decode([token]) or '\0' for token in completion.tokens.tolist())


def test_posed_problems_are_the_same_for_all_and_apart_by_seed(model):
  ask = {'thinkers': 3, 'count': 4}
  one = pose(TASK, MIX, model.tokenizer, **ask, seed=0)
  assert one == pose(TASK, MIX, model.tokenizer, **ask, seed=0)
  assert one != pose(TASK, MIX, model.tokenizer, **ask, seed=1)
  for item in one:
    assert len(set(item.headers)) == 3 and sorted(item.slots) == [0, 1, 2]
  with pytest.raises(UserError, match='thinkers=4 are more than the 3 slots'):
    pose(TASK, MIX, model.tokenizer, thinkers=4, count=1, seed=0)


def test_files(report, tmp_path):
  files = write_group_report(report, tmp_path)
  assert files.picture.read_bytes().startswith(b'\x89PNG')
  saved = json.loads(files.json.read_text())
  assert saved['curves'][1]['way'] == INDEPENDENT and saved['format'] == 1
  rows = list(csv.DictReader(io.StringIO(to_csv(report))))
  assert len(rows) == len(report.curves) * 9
  last = next(r for r in rows if (r['way'], r['thinkers'], r['tokens']) == (GROUP, '3', '8'))
  curve = report.curve(GROUP, 3)
  assert float(last['coverage']) == curve.coverage[8]
  assert float(last['milliseconds']) == pytest.approx(8 * curve.step_ms)
  text = render_groups(report)
  assert 'cross mask off' in text and '6 problems (2 seeds)' in text
  assert '3 thinkers cover' in text


def test_without_baselines_and_times(model, one_device):
  config = GroupEvaluateConfig(thinkers=(2,), prompts=2, seeds=1, tokens=4, speed_steps=0)
  with use(one_device, ShardingRules()):
    report = evaluate_groups(model, TreeSumTask(depth=1), MIX, config, mesh=one_device)
  assert [curve.way for curve in report.curves] == [CHAIN, GROUP]
  assert report.gains == () and {curve.step_ms for curve in report.curves} == {None}
  assert report.curve(GROUP, 2).theory is None
  assert len(report.curve(GROUP, 2).coverage) == 5


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'thinkers': (1,)}, r'thinkers=\(1,\) must be numbers from 2 to 26'),
    ({'lags': (0,)}, r'lags=\(0,\) must be at least 1'),
    ({'prompts': 0}, 'prompts=0 must be at least 1'),
    ({'tokens': 0}, 'tokens=0 must be at least 1'),
  ],
)
def test_bad_settings(changes, words):
  with pytest.raises(UserError, match=words):
    GroupEvaluateConfig(**changes)
