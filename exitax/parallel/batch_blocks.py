"""Which rows of a global batch the devices of one process hold."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import Mesh

from exitax.parallel.rules import ShardingRules


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchBlocks:
  """The part of every global batch that one process loads.

  Attributes:
    own: numbers of its blocks, ascending.
    total: equal blocks, of rows that follow each other, that a batch is cut into.
  """

  own: tuple[int, ...]
  total: int


def batch_blocks(
  mesh: Mesh, rules: ShardingRules, *, process_index: int | None = None
) -> BatchBlocks:
  """The blocks of the batch that lie on a process's devices, on any mesh.

  Processes whose devices differ in `pipeline` or `tensor` only have the same blocks: both load the
  same rows. Blocks need not follow each other (a process of a 4 x 4 torus of chips may have 0, 1, 4
  and 5 of 16) and may overlap in part with those of another process.

  Worked miniature: two processes of four devices. On data 2 x pipeline 2 x tensor 2 process 0 has
  block 0 of 2 and process 1 block 1; on data 1 x pipeline 2 x tensor 4 both have block 0 of 1.

  Args:
    mesh: the mesh; of its devices only `process_index` is read.
    rules: which mesh axes share the batch.
    process_index: which process; this one by default.
  """
  process = jax.process_index() if process_index is None else process_index
  axes = rules.mesh_axes('batch')
  sizes = tuple(mesh.shape[axis] for axis in axes)
  dims = [mesh.axis_names.index(axis) for axis in axes]
  places = [
    tuple(place[dim] for dim in dims)
    for place, device in np.ndenumerate(mesh.devices)
    if device.process_index == process
  ]
  numbers = {int(np.ravel_multi_index(place, sizes)) if sizes else 0 for place in places}
  return BatchBlocks(own=tuple(sorted(numbers)), total=math.prod(sizes))
