"""Which rows a process loads, on meshes of processes that are only imagined."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from exitax import data, parallel

RULES = parallel.ShardingRules()
# Which of four processes has each of 4 x 4 chips.
TORUS = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


@dataclasses.dataclass(frozen=True)
class _Device:
  id: int
  process_index: int


def _mesh(sizes, *, processes, order=None):
  count = int(np.prod(sizes))
  owners = np.arange(count) // (count // processes) if order is None else np.ravel(order)
  devices = [_Device(i, int(owner)) for i, owner in enumerate(owners)]
  grid = np.empty(count, object)
  grid[:] = devices
  return Mesh(grid.reshape(sizes), parallel.MESH_AXES)


def _own(mesh, processes):
  blocks = [parallel.batch_blocks(mesh, RULES, process_index=i) for i in range(processes)]
  assert len({block.total for block in blocks}) == 1
  return [block.own for block in blocks], blocks[0].total


@pytest.mark.parametrize(
  ('sizes', 'processes', 'own', 'total'),
  [
    ((4, 1, 1), 1, [(0, 1, 2, 3)], 4),
    ((4, 1, 1), 2, [(0, 1), (2, 3)], 4),
    ((2, 2, 2), 2, [(0,), (1,)], 2),
    ((2, 2, 2), 4, [(0,), (0,), (1,), (1,)], 2),
    # One data coordinate: everybody loads everything.
    ((1, 2, 4), 2, [(0,), (0,)], 1),
    ((1, 1, 4), 4, [(0,)] * 4, 1),
    # Processes that share a coordinate in part: block 1 is loaded twice.
    ((3, 1, 2), 2, [(0, 1), (1, 2)], 3),
  ],
)
def test_blocks_follow_the_devices(sizes, processes, own, total):
  assert _own(_mesh(sizes, processes=processes), processes) == (own, total)


def test_a_torus_whose_hosts_are_squares_of_chips():
  """4 x 4 chips in hosts of 2 x 2, all on `data`, as `make_mesh` lays out a slice."""
  own, total = _own(_mesh((16, 1, 1), processes=4, order=TORUS), 4)
  assert own == [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)]
  assert data.shards_of_blocks(own[1], total) == (data.Shard(1, 8), data.Shard(3, 8))


def test_rules_that_do_not_share_the_batch():
  rules = parallel.ShardingRules(overrides=(('batch', None),))
  blocks = parallel.batch_blocks(_mesh((4, 1, 1), processes=2), rules, process_index=1)
  assert blocks == parallel.BatchBlocks(own=(0,), total=1)


@pytest.mark.parametrize(
  ('sizes', 'order', 'loaded_by'),
  [
    ((8, 1, 1), None, 1),
    ((16, 1, 1), TORUS, 1),
    ((4, 2, 1), None, 1),
    ((2, 2, 2), None, 2),
    ((1, 2, 4), None, 4),
  ],
)
def test_four_hosts_load_all_rows_and_overlap_only_where_they_share_them(sizes, order, loaded_by):
  tokens = np.arange(1000, 1000 + 8 * 40, dtype=np.uint32)
  stream = data.TokenStream(tokens=tokens, offsets=np.array([0, len(tokens)]))
  rows = data.TrainRows(name='t', rows=data.PackedRows(stream, length=8, pad_id=0))

  def first_batch(shard):
    return next(data.TrainLoader([rows], batch_size=16, seed=0, corpus_digest='', shard=shard))

  whole = np.split(first_batch(data.Shard()).tokens, sizes[0])
  mesh = _mesh(sizes, processes=4, order=order)
  times = np.zeros(sizes[0], int)
  for process in range(4):
    blocks = parallel.batch_blocks(mesh, RULES, process_index=process)
    batch = first_batch(data.shards_of_blocks(blocks.own, blocks.total))
    for block, part in zip(blocks.own, np.split(batch.tokens, len(blocks.own)), strict=True):
      np.testing.assert_array_equal(part, whole[block])
      times[block] += 1
  assert set(times) == {loaded_by}
