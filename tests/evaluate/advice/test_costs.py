from __future__ import annotations

import pytest

from exitax.decode import DeferredExit
from exitax.evaluate.advice import PartCosts, Work, measure_costs
from exitax.evaluate.advice.costs import WHOLES

SEGMENTS = (range(2), range(2, 4), range(4, 6))


def costs(**changes) -> PartCosts:
  """2 per layer span and lane bucket, 1 per head, and invented overheads."""
  lanes = (1, 4, 8, 16)
  fields = {
    'layers': {(0, 1): 2.0, **{(s, n): 2.0 + n / 10 for s in (1, 2) for n in lanes}},
    'heads': (1.0, 1.0),
    'final': {n: 1.0 + n / 10 for n in lanes},
    'copies': (0.0, 0.5, 0.5),
    # Parts of a full step: 2 + 2.1 + 2.1 + 1.1 = 7.3, and 9.3 with both exits' heads.
    'wholes': {
      'full': 7.5,
      'deferred': 9.8,
      'copy_state': 9.6,
      # Of a round of 1 draft at the first exit: 2 * 2 + 1 + (2.4 + 2.4 + 1.4) = 11.2.
      'round': 12.0,
      # Of 7 drafts: 8 * 2 + 7 + (2.8 + 2.8 + 1.8) = 30.4.
      'rounds': 33.0,
    },
    'max_drafts': 7,
  }
  return PartCosts(**{**fields, **changes})


def test_overheads_are_what_wholes_take_beside_their_parts():
  parts = costs()
  assert parts.step == 7.5
  assert parts.overhead('full') == pytest.approx(0.2)
  assert parts.overhead('deferred') == pytest.approx(0.5)
  assert parts.overhead('copy_state') == pytest.approx(0.3)
  # 0.8 beside a round of two passes, 2.6 beside one of eight: 0.3 a pass, and 0.2 a round.
  assert parts.draft_overhead == pytest.approx(0.3)
  assert parts.round_overhead == pytest.approx(0.2)


def test_rounds_that_were_measured_are_predicted_as_measured():
  parts = costs()
  assert parts.draft_costs(1).of_round(0, 1) == pytest.approx(12.0)
  assert parts.draft_costs(7).of_round(0, 7) == pytest.approx(33.0)
  assert parts.draft_costs(7).plain == 7.5
  # At the second exit: 4 passes of 4.1 + 0.3, 3 heads, and the last span over 4 lanes.
  assert parts.draft_costs(3).of_round(1, 3) == pytest.approx(4 * 4.4 + 3 + 2.4 + 1.4 + 0.2)


def test_work():
  work = Work(tokens=10, passes={(0, 1): 10, (1, 4): 2}, heads=(10, 2, 1), copies=(0, 3, 1))
  expected = 10 * 0.5 + 10 * 2 + 2 * 2.4 + 12 * 1 + 1.1 + 4 * 0.5
  assert costs().of_work(work, 'deferred') == pytest.approx(expected / 10)


def test_overheads_are_never_negative():
  wholes = dict.fromkeys(WHOLES, 0.1)
  parts = costs(wholes=wholes)
  assert parts.overhead('full') == parts.draft_overhead == parts.round_overhead == 0


def test_rows_name_every_part():
  rows = costs().to_rows(SEGMENTS)
  names = {row['part'] for row in rows}
  assert {'layers 0:2', 'layers 4:6', 'head of exit 4', 'final head'} <= names
  assert 'whole round, 7 drafts at exit 2' in names
  assert len(rows) == 1 + 8 + 2 + 4 + 2 + 5


def test_parts_are_timed(loaded):
  plan = DeferredExit(threshold=1.0).plan(loaded.model.config)
  calls = []

  def whole(kind: str):
    return lambda: calls.append(kind) or 1e-3

  measured = measure_costs(
    loaded.model,
    loaded.params,
    plan=plan,
    max_drafts=3,
    context=8,
    capacity=64,
    wholes={kind: whole(kind) for kind in WHOLES},
    repeats=2,
  )
  assert set(measured.layers) == {(0, 1), *((s, n) for s in (1, 2) for n in (1, 4, 16))}
  assert set(measured.final) == {1, 4, 16}
  assert len(measured.heads) == 2
  assert all(value > 0 for value in (*measured.layers.values(), *measured.final.values()))
  assert all(value > 0 for value in (*measured.heads, *measured.copies[1:]))
  assert sorted(calls) == sorted(WHOLES * 3)
