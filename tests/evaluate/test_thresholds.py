from __future__ import annotations

import math

import numpy as np
import pytest

from exitax import evaluate
from exitax.errors import UserError
from tests.evaluate.conftest import BYTES_PER_TOKEN, DEPTHS, make_table

TEXT = {'depths': DEPTHS, 'bytes_per_token': BYTES_PER_TOKEN}


def rows_of(table, *, confidence='max_prob', thresholds=evaluate.DEFAULT_THRESHOLDS):
  return evaluate.threshold_rows(table, confidence=confidence, thresholds=thresholds, **TEXT)


@pytest.mark.parametrize('confidence', ['max_prob', 'margin'])
def test_rows_are_what_a_loop_over_tokens_gives(confidence):
  table = make_table()
  for row in rows_of(table, confidence=confidence):
    nll = correct = agrees = layers = 0.0
    left = [0] * len(DEPTHS)
    for token in range(table.num_tokens):
      exit_index = 0
      while exit_index < len(DEPTHS) - 1:
        if table.confidence[confidence][exit_index, token] > np.float32(row.threshold):
          break
        exit_index += 1
      nll += float(table.nll[exit_index, token])
      correct += bool(table.correct[exit_index, token])
      agrees += bool(table.agrees[exit_index, token])
      layers += DEPTHS[exit_index]
      left[exit_index] += 1
    count = table.num_tokens
    assert row.confidence == confidence
    assert row.nll == pytest.approx(nll / count, rel=1e-9)
    assert row.bits_per_byte == pytest.approx(nll / count / math.log(2) / BYTES_PER_TOKEN)
    assert row.accuracy == pytest.approx(correct / count)
    assert row.agreement == pytest.approx(agrees / count)
    assert row.effective_layers == pytest.approx(layers / count)
    assert row.exit_shares == pytest.approx([number / count for number in left])


def test_the_default_thresholds_go_from_full_to_first_exit_and_get_shallower():
  table = make_table()
  rows = rows_of(table)
  assert [row.threshold for row in rows] == pytest.approx([i / 20 for i in range(20, -1, -1)])
  full, first = rows[0], rows[-1]
  assert full.nll == pytest.approx(table.nll[-1].mean(), rel=1e-6)
  assert (full.agreement, full.effective_layers, full.exit_shares) == (1, 4, (0, 0, 1))
  assert first.nll == pytest.approx(table.nll[0].mean(), rel=1e-6)
  assert (first.effective_layers, first.exit_shares) == (1, (1, 0, 0))
  depths = [row.effective_layers for row in rows]
  assert depths == sorted(depths, reverse=True)
  assert len(set(depths)) > 15


def test_confidence_must_be_above_the_threshold():
  table = make_table()
  sure = {'max_prob': np.full_like(table.nll, 0.5)}
  even = evaluate.TokenTable(
    nll=table.nll, correct=table.correct, agrees=table.agrees, confidence=sure
  )
  at, below = rows_of(even, thresholds=(0.5, 0.49))
  assert at.exit_shares == (0, 0, 1)
  assert below.exit_shares == (1, 0, 0)


def test_a_confidence_of_one_does_not_pass_a_threshold_of_one():
  table = make_table()
  sure = {'max_prob': np.ones_like(table.nll)}
  certain = evaluate.TokenTable(
    nll=table.nll, correct=table.correct, agrees=table.agrees, confidence=sure
  )
  assert rows_of(certain, thresholds=(1.0,))[0].exit_shares == (0, 0, 1)


def test_the_oracle_takes_the_earliest_exit_that_agrees():
  table = make_table()
  oracle = evaluate.oracle_score(table, **TEXT)
  depths = [
    next(d for d, agrees in zip(DEPTHS, column, strict=True) if agrees)
    for column in table.agrees.T.tolist()
  ]
  assert oracle.effective_layers == pytest.approx(np.mean(depths))
  assert oracle.agreement == 1
  assert oracle.exit_shares == pytest.approx([np.mean(np.equal(depths, d)) for d in DEPTHS])


@pytest.mark.parametrize('wrong', [1.01, -0.1, float('nan')])
def test_a_threshold_outside_0_to_1_is_refused(wrong):
  with pytest.raises(UserError, match=rf'threshold={wrong} is outside \[0, 1\]'):
    rows_of(make_table(), thresholds=(0.5, wrong))


def test_thresholds_are_sorted_and_need_at_least_one():
  assert evaluate.check_thresholds([0, 0.5, 1, 0.5]) == (1.0, 0.5, 0.0)
  with pytest.raises(UserError, match='no thresholds'):
    evaluate.check_thresholds([])
