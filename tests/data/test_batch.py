from __future__ import annotations

import jax
import numpy as np
import pytest

from exitax import data


def _row(first: int) -> data.Batch:
  values = np.arange(first, first + 3, dtype=np.int32)
  return data.Batch(
    tokens=values,
    targets=values + 1,
    segment_ids=np.ones(3, np.int32),
    positions=np.arange(3, dtype=np.int32),
    weights=np.ones(3, np.float32),
  )


def test_rows_stack_to_a_batch_that_jax_can_map_over():
  batch = data.stack_rows([_row(0), _row(10)])
  np.testing.assert_array_equal(batch.tokens, [[0, 1, 2], [10, 11, 12]])
  np.testing.assert_array_equal(batch.targets, [[1, 2, 3], [11, 12, 13]])
  total = jax.jit(lambda b: jax.tree.map(lambda x: x.sum(), b))(batch)
  assert isinstance(total, data.Batch)
  assert int(total.tokens) == 36
  assert float(total.weights) == 6


def test_batch_cannot_be_changed():
  with pytest.raises(AttributeError):
    _row(0).tokens = np.zeros(3)


def test_empty_row_has_no_document_and_no_weight():
  row = data.empty_row(length=4, pad_id=9)
  np.testing.assert_array_equal(row.tokens, [9, 9, 9, 9])
  assert row.segment_ids.sum() == 0 and row.weights.sum() == 0
  assert row.weights.dtype == np.float32 and row.tokens.dtype == np.int32
