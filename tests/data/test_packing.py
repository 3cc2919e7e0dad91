from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitax import data
from exitax.errors import UserError


class TinyTokenizer(data.ByteTokenizer):
  """Pad 0, start 1, end 2: the miniature of the docstring."""

  pad_id, bos_id, eos_id, vocab_size = 0, 1, 2, 100


def _pack(documents, *, length):
  stream = data.token_stream(documents, tokenizer=TinyTokenizer())
  rows = data.PackedRows(stream, length=length, pad_id=0)
  return data.stack_rows([rows[i] for i in range(len(rows))])


def _expect(batch, **arrays):
  for name, value in arrays.items():
    np.testing.assert_array_equal(getattr(batch, name), value, err_msg=name)


def test_miniature_of_the_module():
  _expect(
    _pack([[5, 6], [7, 8, 9]], length=4),
    tokens=[[1, 5, 6, 2], [1, 7, 8, 9], [2, 0, 0, 0]],
    targets=[[5, 6, 2, 0], [7, 8, 9, 2], [0, 0, 0, 0]],
    segment_ids=[[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]],
    positions=[[0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 0]],
    weights=[[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
  )


def test_miniature_of_the_batch():
  batch = _pack([[11, 12], [13, 14, 15]], length=8)
  _expect(
    batch,
    tokens=[[1, 11, 12, 2, 1, 13, 14, 15], [2, 0, 0, 0, 0, 0, 0, 0]],
    targets=[[11, 12, 2, 0, 13, 14, 15, 2], [0] * 8],
    segment_ids=[[1, 1, 1, 1, 2, 2, 2, 2], [1, 0, 0, 0, 0, 0, 0, 0]],
    positions=[[0, 1, 2, 3, 0, 1, 2, 3], [0] * 8],
    weights=[[1, 1, 1, 0, 1, 1, 1, 1], [0] * 8],
  )
  assert [array.dtype for array in jax.tree.leaves(batch)] == [
    np.int32,
    np.int32,
    np.int32,
    np.int32,
    np.float32,
  ]


def test_long_document_is_cut_and_its_positions_restart():
  _expect(
    _pack([[3, 4, 5, 6, 7]], length=3),
    tokens=[[1, 3, 4], [5, 6, 7], [2, 0, 0]],
    targets=[[3, 4, 5], [6, 7, 2], [0, 0, 0]],
    segment_ids=[[1, 1, 1], [1, 1, 1], [1, 0, 0]],
    positions=[[0, 1, 2], [0, 1, 2], [0, 0, 0]],
    weights=[[1, 1, 1], [1, 1, 1], [0, 0, 0]],
  )


DOCUMENTS = st.lists(st.lists(st.integers(3, 99), max_size=9), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(1, 12))
def test_against_a_loop_over_documents(documents, length):
  """Oracle: place every id by hand, one after the other."""
  batch = _pack(documents, length=length)
  flat = {name: x.reshape(-1) for name, x in vars(batch).items() if x is not None}
  place = 0
  for document in documents:
    framed = [1, *document, 2]
    segment, position = 0, 0
    for index, token in enumerate(framed):
      if place % length == 0:
        segment, position = 1, 0
      elif index == 0:
        segment = flat['segment_ids'][place - 1] + 1
      last = index + 1 == len(framed)
      assert flat['tokens'][place] == token
      assert flat['weights'][place] == (not last)
      assert flat['targets'][place] == (0 if last else framed[index + 1])
      assert flat['segment_ids'][place] == segment
      assert flat['positions'][place] == position
      place, position = place + 1, position + 1
  assert len(flat['tokens']) - place < length
  for name, values in flat.items():
    assert not values[place:].any(), name


@settings(max_examples=100, deadline=None)
@given(documents=DOCUMENTS, length=st.integers(1, 12))
def test_no_target_crosses_documents(documents, length):
  """Each document has ids of its own here, so a leak would show."""
  owned = [[100 * (i + 1) + t for t in document] for i, document in enumerate(documents)]
  batch = _pack(owned, length=length)
  for tokens, targets, segments, weights in zip(
    batch.tokens, batch.targets, batch.segment_ids, batch.weights, strict=True
  ):
    for segment in range(1, segments.max() + 1):
      piece = (segments == segment) & (weights == 1)
      ids = np.concatenate([tokens[piece], targets[piece]])
      assert len(set(ids[ids >= 100] // 100)) <= 1


def test_stream_of_a_large_vocabulary_keeps_its_ids():
  class Large(TinyTokenizer):
    vocab_size = 200_000

  stream = data.token_stream([[150_000]], tokenizer=Large())
  np.testing.assert_array_equal(stream.tokens, [1, 150_000, 2])
  assert data.token_stream([[5]], tokenizer=TinyTokenizer()).tokens.dtype == np.uint16


def test_row_outside_and_bad_length():
  stream = data.token_stream([[5]], tokenizer=TinyTokenizer())
  with pytest.raises(IndexError):
    data.PackedRows(stream, length=4, pad_id=0)[1]
  with pytest.raises(UserError, match='length=0'):
    data.PackedRows(stream, length=0, pad_id=0)


def test_pad_documents_gives_each_a_row():
  batch = data.pad_documents([[5, 6], [], [7]], tokenizer=TinyTokenizer(), length=5)
  _expect(
    batch,
    tokens=[[1, 5, 6, 2, 0], [1, 2, 0, 0, 0], [1, 7, 2, 0, 0]],
    targets=[[5, 6, 2, 0, 0], [2, 0, 0, 0, 0], [7, 2, 0, 0, 0]],
    weights=[[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
    segment_ids=[[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
  )
  with pytest.raises(UserError, match='text 0 has 4 tokens, the limit is 3'):
    data.pad_documents([[5, 6, 7, 8]], tokenizer=TinyTokenizer(), length=5)
