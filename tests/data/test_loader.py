from __future__ import annotations

import collections
import itertools
import json
import sys

import jax
import numpy as np
import pytest

from exitax import data
from exitax.errors import UserError

LENGTH = 8


def _rows(first: int, *, count: int) -> data.PackedRows:
  """`count` full rows whose ids are `first`, `first + 1`, ...: every id stands in one place."""
  tokens = np.arange(first, first + count * LENGTH, dtype=np.uint32)
  stream = data.TokenStream(tokens=tokens, offsets=np.array([0, len(tokens)]))
  return data.PackedRows(stream, length=LENGTH, pad_id=0)


def _loader(*, batch_size=4, seed=0, shard=None, rows=((1000, 10, 1.0),), digest='d', **settings):
  tasks = [
    data.TrainRows(name=str(first), rows=_rows(first, count=count), weight=weight)
    for first, count, weight in rows
  ]
  return data.TrainLoader(
    tasks,
    batch_size=batch_size,
    seed=seed,
    corpus_digest=digest,
    shard=shard or data.Shard(),
    **settings,
  )


def _take(loader, count: int) -> list[data.Batch]:
  return list(itertools.islice(loader, count))


def _assert_same(ours, theirs) -> None:
  for a, b in zip(ours, theirs, strict=True):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      assert x.dtype == y.dtype
      np.testing.assert_array_equal(x, y)


def _row_ids(batches) -> list[int]:
  return [int(row[0]) for batch in batches for row in batch.tokens]


def test_every_token_once_an_epoch_and_in_another_order_each():
  batches = _take(_loader(batch_size=5), 8)
  epochs = [np.concatenate([b.tokens.ravel() for b in batches[i : i + 2]]) for i in range(0, 8, 2)]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(1000, 1080))
  assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize('batch_size', [1, 2, 16])
def test_any_batch_size(batch_size):
  ids = _row_ids(_take(_loader(batch_size=batch_size), 80 // batch_size))
  assert sorted(ids) == sorted([*range(1000, 1080, LENGTH)] * 8)


def test_epochs_join_without_a_gap_where_batches_do_not_divide_them():
  ids = _row_ids(_take(_loader(batch_size=4), 5))
  assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(1000, 1080, LENGTH))


def test_batches_are_numpy_of_the_right_shape():
  [batch] = _take(_loader(batch_size=3), 1)
  assert [type(array) for array in jax.tree.leaves(batch)] == [np.ndarray] * 5
  assert batch.tokens.shape == batch.weights.shape == (3, LENGTH)


def test_seed_decides_the_order():
  _assert_same(_take(_loader(seed=3), 6), _take(_loader(seed=3), 6))
  assert _row_ids(_take(_loader(seed=3), 6)) != _row_ids(_take(_loader(seed=4), 6))


@pytest.mark.parametrize('taken', [0, 1, 2, 3, 7])
def test_state_resumes_bitwise(taken):
  """Ten rows in batches of four: states in the middle of an epoch and across its end."""
  mixture = ((1000, 10, 0.7), (5000, 7, 0.3))
  loader = _loader(rows=mixture)
  _take(loader, taken)
  state = json.loads(json.dumps(loader.get_state()))
  expected = _take(loader, 9)
  resumed = _loader(rows=mixture)
  resumed.set_state(state)
  _assert_same(_take(resumed, 9), expected)
  loader.set_state(state)
  _assert_same(_take(loader, 9), expected)
  assert resumed.get_state() != state


@pytest.mark.parametrize('count', [2, 4])
def test_hosts_are_disjoint_and_their_union_is_the_whole(count):
  mixture = ((1000, 11, 0.5), (5000, 7, 0.5))
  whole = _take(_loader(rows=mixture), 6)
  parts = [
    _take(_loader(rows=mixture, shard=data.Shard(process_index=i, process_count=count)), 6)
    for i in range(count)
  ]
  for step, batch in enumerate(whole):
    together = np.concatenate([part[step].tokens for part in parts])
    np.testing.assert_array_equal(together, batch.tokens)
  one_epoch = [_row_ids(part) for part in parts]
  assert len(set(itertools.chain(*one_epoch))) == 18


def test_a_host_may_load_parts_that_do_not_follow_each_other():
  """Blocks 0, 1, 4, 5 and the rest of 8: the same rows as one host alone, each in one place."""
  whole = _take(_loader(batch_size=16), 5)
  state = None
  for own in ((0, 1, 4, 5), (2, 3, 6, 7)):
    shards = data.shards_of_blocks(own, 8)
    assert len(shards) == 2
    loader = _loader(batch_size=16, shard=shards)
    for step, batch in enumerate(_take(loader, 5)):
      blocks = np.split(whole[step].tokens, 8)
      np.testing.assert_array_equal(batch.tokens, np.concatenate([blocks[i] for i in own]))
    assert state in (None, loader.get_state())
    state = loader.get_state()
  alone = _loader(batch_size=16)
  alone.set_state(state)
  resumed = _loader(batch_size=16, shard=data.shards_of_blocks((2, 3, 6, 7), 8))
  resumed.set_state(state)
  [batch], [part] = _take(alone, 1), _take(resumed, 1)
  np.testing.assert_array_equal(part.tokens[:4], batch.tokens[4:8])
  np.testing.assert_array_equal(part.tokens[4:], batch.tokens[12:])


@pytest.mark.parametrize(
  ('own', 'total', 'shards'),
  [
    ((0,), 1, [(0, 1)]),
    ((0, 1, 2, 3), 4, [(0, 1)]),
    ((2, 3), 4, [(1, 2)]),
    ((1, 2), 4, [(1, 4), (2, 4)]),
    ((0, 1), 3, [(0, 3), (1, 3)]),
    ((4, 5, 6, 7, 12, 13, 14, 15), 16, [(1, 4), (3, 4)]),
  ],
)
def test_blocks_are_put_together_to_shards(own, total, shards):
  assert data.shards_of_blocks(own, total) == tuple(data.Shard(*shard) for shard in shards)


def test_state_moves_to_another_number_of_hosts():
  loader = _loader()
  _take(loader, 3)
  state = loader.get_state()
  expected = _take(loader, 4)
  parts = []
  for index in range(2):
    part = _loader(shard=data.Shard(process_index=index, process_count=2))
    part.set_state(state)
    parts.append(_take(part, 4))
  for step, batch in enumerate(expected):
    together = np.concatenate([part[step].tokens for part in parts])
    np.testing.assert_array_equal(together, batch.tokens)


@pytest.mark.parametrize('weights', [(0.75, 0.25), (3.0, 1.0)])
def test_mixture_keeps_its_weights(weights):
  rows = ((1000, 10, weights[0]), (5000, 10, weights[1]))
  batches = _take(_loader(rows=rows), 20)
  assert [sum(i < 5000 for i in _row_ids([batch])) for batch in batches] == [3] * 20
  counts = collections.Counter(_row_ids(batches))
  assert sorted(counts[i] for i in range(1000, 1080, LENGTH)) == [6] * 10
  assert sorted(counts[i] for i in range(5000, 5080, LENGTH)) == [2] * 10


def test_uneven_weights_are_met_in_the_long_run():
  rows = ((1000, 10, 0.61), (5000, 10, 0.39))
  ids = _row_ids(_take(_loader(rows=rows, batch_size=20), 20))
  assert abs(sum(i < 5000 for i in ids) - 0.61 * 400) <= 2


def test_tasks_of_a_mixture_are_shuffled_apart():
  ids = _row_ids(_take(_loader(rows=((0, 20, 1.0), (8000, 20, 1.0))), 10))
  first = [i for i in ids if i < 8000]
  second = [i - 8000 for i in ids if i >= 8000]
  assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize(
  'other', [{'digest': 'e'}, {'seed': 1}, {'batch_size': 8}, {'rows': ((1000, 10, 1.0),) * 2}]
)
def test_state_of_other_data_is_refused(other):
  with pytest.raises(UserError, match='belongs to other data than this run'):
    _loader(**other).set_state(_loader().get_state())


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'batch_size': 0}, 'batch_size=0 is not a positive multiple of 1'),
    (
      {'batch_size': 5, 'shard': data.Shard(0, 2)},
      'batch_size=5 is not a positive multiple of 2 processes: choose such as 4',
    ),
    ({'shard': data.Shard(2, 2)}, 'process_index=2 is outside 0 to process_count-1=1'),
    ({'seed': -1}, 'seed=-1 is negative'),
  ],
)
def test_bad_input(settings, message):
  with pytest.raises(UserError, match=message):
    _loader(**settings)


def test_missing_grain(monkeypatch):
  monkeypatch.setitem(sys.modules, 'grain', None)
  with pytest.raises(UserError, match='needs the grain package'):
    _loader()
