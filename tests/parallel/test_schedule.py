"""Schedules are exact: every piece of work once, in order, on time, and no more in flight than told."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from exitax.errors import UserError
from exitax.parallel import schedule as sched
from exitax.parallel.schedule import IDLE, ScheduleKind

CASES = [
  *(
    (kind, stages, microbatches, 1)
    for kind in (ScheduleKind.GPIPE, ScheduleKind.ONE_F_ONE_B)
    for stages, microbatches in itertools.product((1, 2, 3, 4, 8), (1, 2, 4, 7, 16))
  ),
  *(
    (ScheduleKind.INTERLEAVED, stages, stages * rounds, chunks)
    for stages, rounds, chunks in itertools.product((1, 2, 4), (1, 2, 3), (1, 2, 3))
  ),
]


def _work(table, stages):
  """(microbatch, span) -> tick, checked to occur once."""
  found = {}
  for tick, stage in np.argwhere(table.microbatch != IDLE):
    key = (int(table.microbatch[tick, stage]), int(table.chunk[tick, stage]) * stages + int(stage))
    assert key not in found
    found[key] = int(tick)
  return found


@pytest.mark.parametrize(('kind', 'stages', 'microbatches', 'chunks'), CASES)
def test_every_microbatch_passes_every_span_forward_then_backward(
  kind, stages, microbatches, chunks
):
  table = sched.make_schedule(
    kind, num_stages=stages, num_microbatches=microbatches, num_chunks=chunks
  )
  forward, backward = _work(table.forward, stages), _work(table.backward, stages)
  spans = stages * chunks
  everything = set(itertools.product(range(microbatches), range(spans)))
  assert set(forward) == set(backward) == everything
  for microbatch, span in everything:
    if (
      span
    ):  # What a span reads was sent at the end of the tick before, and nothing keeps it longer.
      assert forward[microbatch, span] == forward[microbatch, span - 1] + 1
      assert backward[microbatch, span - 1] == backward[microbatch, span] + 1
  for microbatch in range(microbatches):
    assert backward[microbatch, spans - 1] >= forward[microbatch, spans - 1]


@pytest.mark.parametrize(('kind', 'stages', 'microbatches', 'chunks'), CASES)
def test_slots_hold_what_is_in_flight_and_nothing_else(kind, stages, microbatches, chunks):
  table = sched.make_schedule(
    kind, num_stages=stages, num_microbatches=microbatches, num_chunks=chunks
  )
  most = 0
  for stage in range(stages):
    held: dict[int, tuple[int, int]] = {}
    for tick in range(table.num_ticks):
      if table.forward.busy[tick, stage]:
        slot = int(table.forward.slot[tick, stage])
        assert slot not in held
        held[slot] = (table.forward.microbatch[tick, stage], table.forward.chunk[tick, stage])
        most = max(most, len(held))
      else:
        assert table.forward.slot[tick, stage] == table.num_slots
      if table.backward.busy[tick, stage]:
        slot = int(table.backward.slot[tick, stage])
        wanted = (table.backward.microbatch[tick, stage], table.backward.chunk[tick, stage])
        assert held.pop(slot) == wanted
      else:
        assert table.backward.slot[tick, stage] == table.num_slots
    assert not held
  assert table.num_slots == most
  assert table.num_slots == max(table.num_slots_of(stage) for stage in range(stages))


@pytest.mark.parametrize(('kind', 'stages', 'microbatches', 'chunks'), CASES)
@pytest.mark.parametrize('ratio', [1.0, 2.0, 3.0])
def test_bubble_is_the_formula(kind, stages, microbatches, chunks, ratio):
  table = sched.make_schedule(
    kind, num_stages=stages, num_microbatches=microbatches, num_chunks=chunks
  )
  formula = sched.bubble_formula(stages, microbatches, chunks)
  assert table.bubble_fraction(backward_over_forward=ratio) == pytest.approx(formula, abs=1e-12)
  # Lock step: (v M + P - 1) forwards and as many backwards.
  items = microbatches * chunks + stages - 1
  assert table.time(backward_over_forward=ratio) == items * (1 + ratio)


@pytest.mark.parametrize('microbatches', [8, 16, 64])
def test_1f1b_keeps_as_few_in_flight_however_many_there_are(microbatches):
  table = sched.make_schedule('1f1b', num_stages=4, num_microbatches=microbatches)
  assert table.num_slots == 2 * 4 - 1
  assert [table.num_slots_of(stage) for stage in range(4)] == [7, 5, 3, 1]
  assert [(p.has_forward, p.has_backward) for p in table.phases] == [
    (True, False),
    (True, True),
    (False, True),
  ]
  assert [p.stop - p.start for p in table.phases] == [3, microbatches, 3]
  gpipe = sched.make_schedule('gpipe', num_stages=4, num_microbatches=microbatches)
  assert gpipe.num_slots == microbatches


def test_phases_cover_the_table():
  for kind, stages, microbatches, chunks in CASES:
    table = sched.make_schedule(
      kind, num_stages=stages, num_microbatches=microbatches, num_chunks=chunks
    )
    assert [p.start for p in table.phases] == [0, *(p.stop for p in table.phases[:-1])]
    assert table.phases[-1].stop == table.num_ticks


def test_a_schedule_for_evaluation_has_no_backward():
  table = sched.forward_schedule(num_stages=3, num_microbatches=5)
  assert not table.backward.busy.any()
  assert table.num_ticks == 7
  assert table.num_slots == 0
  assert set(_work(table.forward, 3)) == set(itertools.product(range(5), range(3)))


def test_text_shows_the_table():
  table = sched.make_schedule('1f1b', num_stages=2, num_microbatches=3)
  assert sched.render_schedule(table).splitlines() == [
    'stage 0  f0 f1   f2b0 b1   b2',
    'stage 1  .  f0b0 f1b1 f2b2 .',
  ]
  table = sched.make_schedule('interleaved', num_stages=2, num_microbatches=2, num_chunks=2)
  lines = [' '.join(line.split()) for line in sched.render_schedule(table).splitlines()]
  assert lines[0] == "stage 0 f0 f1 f0' f1' b0' b1' b0 b1"
  assert lines[1] == "stage 1 . f0 f1 f0'b0' f1'b1' b0 b1 ."


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ({'kind': '1f1b', 'num_stages': 0, 'num_microbatches': 4}, 'num_stages=0 must be at least 1'),
    ({'kind': 'gpipe', 'num_stages': 2, 'num_microbatches': 4, 'num_chunks': 2}, 'interleaved'),
    (
      {'kind': 'interleaved', 'num_stages': 4, 'num_microbatches': 6, 'num_chunks': 2},
      'num_microbatches=6 is not a multiple of the 4 stages, as interleaving needs: choose 4 or 8',
    ),
    ({'kind': 'zigzag', 'num_stages': 2, 'num_microbatches': 4}, 'zigzag'),
  ],
)
def test_sizes_that_do_not_fit_are_named(arguments, words):
  kind = arguments.pop('kind')
  with pytest.raises(UserError, match=words):
    sched.make_schedule(kind, **arguments)
