from __future__ import annotations

import numpy as np
import pytest

from exitax import data
from exitax.errors import UserError


def _rows(first: int, *, count: int) -> data.PackedRows:
  tokens = np.arange(first, first + count * 4, dtype=np.uint32)
  stream = data.TokenStream(tokens=tokens, offsets=np.array([0, len(tokens)]))
  return data.PackedRows(stream, length=4, pad_id=0)


PARTS = (_rows(100, count=5), _rows(500, count=2))
EVERY_ID = [*range(100, 120), *range(500, 508)]


def test_every_row_once_in_order_then_padding():
  loader = data.EvalLoader(PARTS, batch_size=4)
  batches = list(loader)
  assert len(loader) == len(batches) == 2
  assert all(batch.tokens.shape == (4, 4) for batch in batches)
  tokens = np.concatenate([batch.tokens for batch in batches])
  assert list(tokens[:7].ravel()) == EVERY_ID
  last = batches[-1]
  assert not last.weights[3].any() and not last.segment_ids[3].any()
  assert [list(b.tokens.ravel()) for b in loader] == [list(b.tokens.ravel()) for b in batches]


def test_hosts_get_as_many_batches_and_their_union_is_the_whole():
  parts = [
    list(data.EvalLoader(PARTS, batch_size=4, shard=data.Shard(index, 4))) for index in range(4)
  ]
  assert {len(part) for part in parts} == {2}
  tokens = np.stack([[batch.tokens[0] for batch in part] for part in parts], axis=1)
  assert list(tokens.reshape(-1, 4)[:7].ravel()) == EVERY_ID


def test_a_host_may_have_parts_that_do_not_follow_each_other():
  whole = list(data.EvalLoader(PARTS, batch_size=4))
  some = list(data.EvalLoader(PARTS, batch_size=4, shard=data.shards_of_blocks((0, 2), 4)))
  for batch, part in zip(whole, some, strict=True):
    np.testing.assert_array_equal(part.tokens, batch.tokens[[0, 2]])
    np.testing.assert_array_equal(part.weights, batch.weights[[0, 2]])


def test_some_rows_are_spread_over_all():
  [batch] = data.EvalLoader(PARTS, batch_size=4, max_rows=3)
  assert list(batch.tokens[:, 0]) == [100, 108, 116, 0]
  assert len(data.EvalLoader(PARTS, batch_size=4, max_rows=99)) == 2


def test_bad_input():
  with pytest.raises(UserError, match='no held-out text'):
    data.EvalLoader([_rows(0, count=0)], batch_size=4)
  with pytest.raises(UserError, match='max_rows=0'):
    data.EvalLoader(PARTS, batch_size=4, max_rows=0)
  with pytest.raises(UserError, match='batch_size=3 is not'):
    data.EvalLoader(PARTS, batch_size=3, shard=data.Shard(0, 2))
