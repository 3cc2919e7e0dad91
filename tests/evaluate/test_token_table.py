from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from exitax import data, decode, evaluate
from exitax.models import logits_at_exits
from exitax.parallel import MeshConfig, ShardingRules, make_mesh
from tests.evaluate.conftest import make_loaded

all_logits = jax.jit(logits_at_exits, static_argnums=0)
MEASURES = {measure.value: measure for measure in decode.OF_SCORES}


def table_of(loaded, batches, *, mesh, chunk_length=16):
  return evaluate.token_table(
    loaded.model,
    loaded.params,
    batches,
    measures=MEASURES,
    chunk_length=chunk_length,
    mesh=mesh,
    rules=ShardingRules(),
  )


def naive(loaded, batches):
  """The same table from whole logits in float64 NumPy, token by token."""
  columns = []
  for batch in batches:
    logits = np.asarray(
      all_logits(loaded.model, loaded.params, batch.tokens, batch.segment_ids, batch.positions),
      np.float64,
    )
    for row, place in np.argwhere(batch.weights > 0):
      scores, target = logits[:, row, place], batch.targets[row, place]
      probs = np.exp(scores - scores.max(1, keepdims=True))
      probs /= probs.sum(1, keepdims=True)
      ordered = np.sort(probs, axis=1)
      best = probs.argmax(1)
      columns.append(
        {
          'nll': -np.log(probs[:, target]),
          'correct': best == target,
          'agrees': best == best[-1],
          'max_prob': ordered[:, -1],
          'margin': ordered[:, -1] - ordered[:, -2],
          'entropy': 1 + (probs * np.log(probs)).sum(1) / np.log(probs.shape[1]),
        }
      )
  return {name: np.stack([column[name] for column in columns], axis=1) for name in columns[0]}


def assert_equal(table, expected):
  np.testing.assert_allclose(table.nll, expected['nll'], rtol=1e-4)
  np.testing.assert_array_equal(table.correct, expected['correct'])
  np.testing.assert_array_equal(table.agrees, expected['agrees'])
  for name in MEASURES:
    np.testing.assert_allclose(table.confidence[name], expected[name], atol=1e-4)


def test_the_table_is_what_whole_logits_give(loaded, corpus, one_device):
  batches = list(corpus.eval_loader(max_rows=6))
  table = table_of(loaded, batches, mesh=one_device, chunk_length=5)
  expected = naive(loaded, batches)
  assert table.num_tokens == sum(int(np.sum(batch.weights)) for batch in batches)
  assert 0 < expected['agrees'][:-1].mean() < 1  # Else the comparison says little.
  assert_equal(table, expected)


def test_padding_is_not_counted(loaded, corpus, one_device):
  *_, batch = corpus.eval_loader()  # Ends of documents, and of the text.
  empty = data.stack_rows([data.empty_row(length=16, pad_id=corpus.tokenizer.pad_id)] * 4)
  alone = table_of(loaded, [batch], mesh=one_device)
  beside = table_of(loaded, [empty, batch, empty], mesh=one_device)
  np.testing.assert_array_equal(alone.nll, beside.nll)
  assert alone.num_tokens == int(batch.weights.sum()) < batch.weights.size
  # What stands where nothing counts is not read.
  changed = dataclasses.replace(batch, targets=np.where(batch.weights > 0, batch.targets, 3))
  np.testing.assert_array_equal(alone.nll, table_of(loaded, [changed], mesh=one_device).nll)


def test_a_mesh_of_eight_devices_gives_the_same(loaded, corpus):
  mesh = make_mesh(MeshConfig(data=4, tensor=2), jax.devices())
  spread = make_loaded(corpus.tokenizer, mesh)
  batches = list(corpus.eval_loader(max_rows=6))
  assert_equal(table_of(spread, batches, mesh=mesh), naive(loaded, batches))


def test_no_batches_are_refused(loaded, one_device):
  with pytest.raises(ValueError, match='no batches'):
    table_of(loaded, [], mesh=one_device)
