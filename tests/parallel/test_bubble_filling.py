"""Extra microbatches in the bubble: placed where nothing was, in an order that can be run."""

from __future__ import annotations

import numpy as np
import pytest

from exitax.errors import UserError
from exitax.parallel import fill_bubbles, make_schedule, max_extras, render_schedule

CASES = [(4, 2.0), (5, 2.5), (8, 1.0), (8, 2.0), (8, 3.0), (16, 2.0)]


def _tables(stages, ratio, microbatches=None):
  plain = make_schedule('1f1b', num_stages=stages, num_microbatches=microbatches or 2 * stages)
  return plain, fill_bubbles(plain, backward_over_forward=ratio)


def _places(array, number):
  return [tuple(int(n) for n in place) for place in np.argwhere(array == number)]


@pytest.mark.parametrize(('stages', 'ratio'), CASES)
def test_as_many_fit_as_the_formula_says(stages, ratio):
  _, filled = _tables(stages, ratio)
  formula = int((stages - 1) * ratio / (1 + ratio) + 1e-9)
  assert len(filled.extra_depths) == max_extras(stages, ratio) == formula
  # They grow no deeper than a way there and back before the first gradient comes.
  assert max(filled.extra_depths) == (stages - 1) // 2


@pytest.mark.parametrize(('stages', 'ratio'), CASES)
def test_what_was_in_the_table_stays_where_it_was(stages, ratio):
  plain, filled = _tables(stages, ratio)
  np.testing.assert_array_equal(filled.forward.microbatch, plain.forward.microbatch)
  was = plain.backward.busy
  np.testing.assert_array_equal(filled.backward.microbatch[was], plain.backward.microbatch[was])
  assert filled.num_ticks == plain.num_ticks
  assert filled.time(backward_over_forward=ratio) == plain.time(backward_over_forward=ratio)
  assert filled.num_slots == plain.num_slots
  bubbles = [s.bubble_fraction(backward_over_forward=ratio) for s in (filled, plain)]
  assert bubbles[0] < bubbles[1]


@pytest.mark.parametrize(('stages', 'ratio'), CASES)
def test_an_extra_goes_down_its_stages_and_back(stages, ratio):
  """Next stage the next tick, in the same lane, which is where the executor looks."""
  _, filled = _tables(stages, ratio)
  assert filled.late is not None
  assert filled.begins is not None
  for number, depth in enumerate(filled.extra_depths, start=filled.num_microbatches):
    forwards = _places(filled.late.microbatch, number)
    backwards = _places(filled.backward.microbatch, number)
    first, _, lane = forwards[0]
    assert forwards == [(first + stage, stage, lane) for stage in range(depth)]
    back = backwards[0][0]
    assert backwards == [(back + i, depth - 1 - i) for i in range(depth)]
    assert back > forwards[-1][0]
    assert [place for place in _places(filled.begins, True) if place == backwards[0]]
  assert filled.begins.sum() == len(filled.extra_depths)


@pytest.mark.parametrize(('stages', 'ratio'), CASES)
def test_a_place_holds_one_backward_or_as_many_forwards_as_last_as_long(stages, ratio):
  _, filled = _tables(stages, ratio)
  assert filled.late is not None
  forwards = filled.late.busy.sum(axis=2)
  assert forwards.max() <= ratio
  assert not (forwards.astype(bool) & filled.backward.busy).any()


@pytest.mark.parametrize(('stages', 'ratio'), CASES)
def test_slots_hold_one_thing_at_a_time(stages, ratio):
  _, filled = _tables(stages, ratio)
  assert filled.late is not None
  for stage in range(stages):
    held = {}
    for tick in range(filled.num_ticks):
      begun = [(filled.forward, (tick, stage))]
      begun += [(filled.late, (tick, stage, lane)) for lane in range(int(ratio))]
      for table, place in begun:
        if table.busy[place]:
          slot = int(table.slot[place])
          assert slot not in held
          held[slot] = int(table.microbatch[place])
      if filled.backward.busy[tick, stage]:
        slot = int(filled.backward.slot[tick, stage])
        assert held.pop(slot) == filled.backward.microbatch[tick, stage]
    assert not held


def test_extras_that_reach_no_exit_are_not_placed():
  plain = make_schedule('1f1b', num_stages=8, num_microbatches=16)
  assert fill_bubbles(plain, backward_over_forward=2.0, min_depth=3).extra_depths == (3, 3)
  assert fill_bubbles(plain, backward_over_forward=2.0, min_depth=4) is plain


def test_the_table_as_text():
  _, filled = _tables(4, 2.0, microbatches=5)
  first = render_schedule(filled).splitlines()[0]
  assert first == 'stage 0  f0 f1 f2 f3F5F6 f4b5 b6   b0   b1   b2 b3 b4'


@pytest.mark.parametrize(
  ('kind', 'chunks', 'ratio', 'message'),
  [
    ('gpipe', 1, 2.0, "bubbles of 'gpipe' are not filled: choose schedule '1f1b'"),
    ('interleaved', 2, 2.0, "bubbles of 'interleaved' are not filled"),
    ('1f1b', 1, 0.5, 'time of 0.5 is below 1'),
  ],
)
def test_what_cannot_be_filled(kind, chunks, ratio, message):
  table = make_schedule(kind, num_stages=4, num_microbatches=8, num_chunks=chunks)
  with pytest.raises(UserError, match=message):
    fill_bubbles(table, backward_over_forward=ratio)
