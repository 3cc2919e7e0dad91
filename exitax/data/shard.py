"""Which rows of every global batch one process loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from exitax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Shard:
  """A part of every global batch: the `process_index`-th of `process_count` equal ones."""

  process_index: int = 0
  process_count: int = 1

  def local_batch_size(self, batch_size: int) -> int:
    """Rows of a global batch of `batch_size` that this process loads.

    Raises:
      UserError: the processes do not divide the batch, or the index is out of range.
    """
    if not 0 <= self.process_index < self.process_count:
      raise UserError(
        f'process_index={self.process_index} is outside 0 to process_count-1='
        f'{self.process_count - 1}'
      )
    if batch_size < 1 or batch_size % self.process_count:
      raise UserError(
        f'batch_size={batch_size} is not a positive multiple of {self.process_count} processes: '
        f'choose such as {max(1, batch_size // self.process_count) * self.process_count}'
      )
    return batch_size // self.process_count


WHOLE = Shard()
"""All of every batch: one process alone."""

Shards = Shard | Sequence[Shard]
"""What one process loads: a part, or several, whose rows follow each other in every batch."""


def shards_of_blocks(own: Sequence[int], total: int) -> tuple[Shard, ...]:
  """The fewest shards that are the blocks `own`, in that order, of a batch cut into `total`.

  Worked miniature: blocks (2, 3) of 4 are the second half, `Shard(1, 2)`; blocks (0, 1, 4, 5) of 8
  are `Shard(0, 4)` and `Shard(2, 4)`.

  Args:
    own: different block numbers, ascending.
    total: blocks of a batch.
  """
  for size in range(len(own), 1, -1):
    if total % size or len(own) % size:
      continue
    runs = [tuple(own[i : i + size]) for i in range(0, len(own), size)]
    if all(run[0] % size == 0 and run == tuple(range(run[0], run[0] + size)) for run in runs):
      return tuple(Shard(run[0] // size, total // size) for run in runs)
  return tuple(Shard(block, total) for block in own)


def parts_of(shard: Shards) -> tuple[Shard, ...]:
  """One shard or several, as several."""
  return (shard,) if isinstance(shard, Shard) else tuple(shard)
