from __future__ import annotations

import importlib
import json

import pytest


@pytest.fixture
def common(monkeypatch, repository):
  """The module as the programs in `benchmarks/` import it."""
  monkeypatch.syspath_prepend(str(repository / 'benchmarks'))
  return importlib.import_module('common')


def test_goals_are_met_on_their_own_side(common):
  def met(value, op):
    return common.Goal(name='x', value=value, op=op, goal=1.0).met

  assert met(1.0, '>=') and met(1.5, '>=') and not met(0.9, '>=')
  assert met(1.0, '<=') and met(0.5, '<=') and not met(1.1, '<=')


def test_the_last_line_is_the_report(common, capsys):
  goals = [
    common.Goal(name='speed', value=2.0, op='>=', goal=1.0),
    common.Goal(name='memory', value=1.2, op='<=', goal=1.1),
  ]
  common.finish('toy', [{'case': 'a', 'ms': 1.5}, {'case': 'b', 'share': 0.25}], goals)
  *table, last = capsys.readouterr().out.splitlines()
  report = json.loads(last)
  assert set(report) == {'benchmark', 'commit', 'machine', 'rows', 'goals'}
  assert [goal['met'] for goal in report['goals']] == [True, False]
  assert set(report['goals'][0]) == {'name', 'value', 'op', 'goal', 'met'}
  assert report['rows'][1] == {'case': 'b', 'share': 0.25}
  assert table[0].split() == ['case', 'ms', 'share']
  assert 'MISSED' in table[-1] and 'MISSED' not in table[-2]


def test_measures_take_turns(common, monkeypatch):
  monkeypatch.setattr(common, 'SETTLE_SECONDS', 0.0)
  calls = []

  def measure(name, seconds):
    def run():
      calls.append(name)
      return seconds * len(calls)

    return run

  seconds = common.in_turns({'a': measure('a', 1.0), 'b': measure('b', 1.0)}, 3)
  assert calls == ['a', 'b'] * 3
  assert seconds == {'a': [1.0, 3.0, 5.0], 'b': [2.0, 4.0, 6.0]}
  assert common.median_ratio(seconds['b'], seconds['a']) == 4.0 / 3.0
