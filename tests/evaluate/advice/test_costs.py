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
    },
  }
  return PartCosts(**{**fields, **changes})


def test_overheads_are_what_wholes_take_beside_their_parts():
  parts = costs()
  assert parts.step == 7.5
  assert parts.overhead('full') == pytest.approx(0.2)
  assert parts.overhead('deferred') == pytest.approx(0.5)
  assert parts.overhead('copy_state') == pytest.approx(0.3)


def test_work():
  work = Work(tokens=10, passes={(0, 1): 10, (1, 4): 2}, heads=(10, 2, 1), copies=(0, 3, 1))
  expected = 10 * 0.5 + 10 * 2 + 2 * 2.4 + 12 * 1 + 1.1 + 4 * 0.5
  assert costs().of_work(work, 'deferred') == pytest.approx(expected / 10)


def test_overheads_are_never_negative():
  wholes = dict.fromkeys(WHOLES, 0.1)
  parts = costs(wholes=wholes)
  assert parts.overhead('full') == parts.overhead('deferred') == 0


def test_rows_name_every_part():
  rows = costs().to_rows(SEGMENTS)
  names = {row['part'] for row in rows}
  assert {'layers 0:2', 'layers 4:6', 'head of exit 4', 'final head'} <= names
  assert 'whole step of full depth' in names
  assert len(rows) == 1 + 8 + 2 + 4 + 2 + 3


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
