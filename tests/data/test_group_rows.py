"""Rows of groups: what a problem and the texts about it become."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from exitax import data
from exitax.data import ByteTokenizer, GroupData, GroupDataConfig, GroupMix, GroupRows
from exitax.data.group_tasks import EnumerationTask, TreeSumTask, units_in
from exitax.errors import UserError

TASK = EnumerationTask(num_items=8)


def rows(**changes) -> GroupRows:
  mix = GroupMix(thinkers=(1, 3), lags=(0, 2, -1), slots=4, slot_width=24)
  settings = {'tokenizer': ByteTokenizer(), 'length': 96, 'seed': 3, **changes}
  return GroupRows(TASK, mix, **settings)


def test_a_row_holds_the_prompt_and_one_token_of_every_thinker_per_step():
  tokenizer = ByteTokenizer()
  for index in range(12):
    row = rows()[index]
    used = row.segment_ids == 1  # Whole; the last of a row may be cut off.
    owner, step = row.origin.owner[used], row.origin.step[used]
    length = int((owner < 0).sum())
    assert (owner[:length] < 0).all() and (step[:length] == -1).all()
    assert tokenizer.decode(row.tokens[:length]).startswith('list ')
    np.testing.assert_array_equal(row.positions[:length], np.arange(length))
    order = list(zip(step[length:].tolist(), owner[length:].tolist(), strict=True))
    assert order == sorted(set(order))
    slots = set()
    for thinker in set(owner[length:].tolist()):
      own = np.flatnonzero(used & (row.origin.owner == thinker))
      np.testing.assert_array_equal(row.origin.step[own], np.arange(len(own)))
      text = tokenizer.decode(row.tokens[own])
      assert text[0] == '|' and text[1] in data.group_rows.NAMES
      first = int(row.positions[own[0]]) - length
      assert first % 24 == 0 and first // 24 < 4
      slots.add(first)
      np.testing.assert_array_equal(row.positions[own], length + first + np.arange(len(own)))
      # Targets are the thinker's own next tokens, from the header's end on.
      np.testing.assert_array_equal(row.targets[own[1:-1]], row.tokens[own[2:]])
      np.testing.assert_array_equal(row.weights[own], [0, *[1] * (len(own) - 2), 0])
      assert row.tokens[own[-1]] == tokenizer.eos_id
    assert len(slots) == len(set(owner[length:].tolist()))
    assert not row.weights[:length].any()


def test_a_row_is_filled_with_problems():
  for index in range(12):
    row = rows(length=256)[index]
    segments = row.segment_ids
    assert segments.max() >= 3
    assert (np.diff(segments[segments > 0]) >= 0).all()
    # What is left at the end is less than a prompt, its headers and a step.
    assert (segments == 0).sum() < len('list 12345678') + 2 + 3 * 3
    assert not row.weights[segments == 0].any()
    for segment in range(1, segments.max() + 1):
      here = segments == segment
      assert row.positions[here][0] == 0 and len(set(row.origin.lag[here].tolist())) == 1
      assert ByteTokenizer().decode(row.tokens[here]).startswith('list ')


def test_rows_come_from_their_number_and_seed():
  one, again, other, later = rows()[5], rows()[5], rows(seed=4)[5], rows()[6]
  for name in ('tokens', 'targets', 'positions', 'weights'):
    np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
  assert not np.array_equal(one.tokens, other.tokens)
  assert not np.array_equal(one.tokens, later.tokens)
  with pytest.raises(IndexError):
    rows(count=5)[5]


def test_teachers_see_what_the_row_says():
  """Independent thinkers write every item each; those that see each other share them."""
  tokenizer, seen = ByteTokenizer(), {}
  for index in range(60):
    row = rows()[index]
    used = row.segment_ids == 1
    of_texts = used & (row.origin.owner >= 0)
    owners = sorted(set(row.origin.owner[of_texts].tolist()))
    if len(owners) == 3:
      # The prompt says which items there are.
      prompt = tokenizer.decode(row.tokens[used & (row.origin.owner < 0)])
      problem = data.group_tasks.Enumeration(tuple(prompt[5:].rstrip('\n')))
      texts = [tokenizer.decode(row.tokens[used & (row.origin.owner == n)])[2:] for n in owners]
      written = sum(len(units_in(problem, text)) for text in texts)
      seen.setdefault(int(row.origin.lag[0]), []).append(written)
  assert set(seen[data.group_rows.NEVER]) == {24}
  assert max(np.mean(seen[0]), 8) < np.mean(seen[2]) < 24


def test_what_does_not_fit_is_left_out_by_whole_steps():
  row = rows(length=40)[1]
  assert row.tokens.shape == (40,)
  step = row.origin.step[row.segment_ids == 1]
  counts = [int((step == t).sum()) for t in range(step.max() + 1)]
  assert counts == sorted(counts, reverse=True)


def test_loaders_give_rows_that_the_other_never_gives():
  config = GroupDataConfig(
    tasks=('enumeration', TreeSumTask(depth=2)), length=160, batch_size=4, eval_rows=3
  )
  found = data.build_data(config)
  assert isinstance(found, GroupData)
  loader = found.train_loader()
  batches = [next(loader) for _ in range(3)]
  state = loader.get_state()
  after = next(loader)
  loader = found.train_loader()
  loader.set_state(state)
  np.testing.assert_array_equal(next(loader).tokens, after.tokens)
  held = list(found.eval_loader())
  assert len(held) == 2 and held[0].origin.owner.shape == (4, 160)
  assert held[1].weights[2:].sum() == 0  # Six rows in two batches of four.
  trained = {row.tobytes() for batch in batches for row in batch.tokens}
  assert not trained & {row.tobytes() for batch in held for row in batch.tokens}
  assert found.digest != data.build_data(GroupDataConfig(length=160)).digest
  found.check_context(1024)
  with pytest.raises(UserError, match=r'8 slots of 64 need .* positions, max_length=128'):
    found.check_context(128)


@pytest.mark.parametrize(
  ('make', 'words'),
  [
    (lambda: GroupMix(thinkers=()), r'thinkers=\(\) must be numbers from 1 to 26'),
    (lambda: GroupMix(thinkers=(0,)), 'from 1 to 26'),
    (lambda: GroupMix(thinkers=(9,)), 'slots=8 are fewer than the 9 thinkers'),
    (lambda: GroupMix(lags=(-2,)), r'lags=\(-2,\) must be 0 or more, or -1'),
    (lambda: GroupDataConfig(tasks=()), 'tasks is empty'),
    (lambda: GroupDataConfig(tasks=('chess',)), "no task 'chess' for groups: choose enumeration"),
    (lambda: GroupDataConfig(length=0), 'length=0 must be at least 1'),
    (lambda: GroupDataConfig(seed=-1), 'data seed=-1 is negative'),
  ],
)
def test_bad_settings_are_named(make, words):
  with pytest.raises(UserError, match=words):
    make()


def test_tasks_are_found_by_name():
  assert {task.name for task in map(data.find_group_task, data.GROUP_TASKS)} == set(
    data.GROUP_TASKS
  )
  names = [task.name for task in itertools.chain(data.GROUP_TASKS.values())]
  assert names == ['enumeration', 'floyd_warshall', 'tree_sum', 'template']
