"""Finite, ordered batches of held-out rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from exitax.data.batch import Batch, stack_rows
from exitax.data.group_rows import GroupRows
from exitax.data.packing import PackedRows
from exitax.data.shard import WHOLE, Shards, parts_of
from exitax.errors import UserError


class EvalLoader:
  """Every held-out row once, in order; may be iterated over again and again.

  All processes get the same number of batches of the same shape: missing rows at the end are
  padding with weight 0.
  """

  def __init__(
    self,
    parts: Sequence[PackedRows | GroupRows],
    *,
    batch_size: int,
    shard: Shards = WHOLE,
    max_rows: int | None = None,
  ) -> None:
    """Chains the rows of `parts`.

    Args:
      parts: rows of one length and pad id.
      batch_size: rows of a global batch, over all processes.
      shard: the part of this process, or its parts.
      max_rows: at most so many rows, spread evenly; None takes all.

    Raises:
      UserError: there are no rows, or a number is out of range.
    """
    places = [(part, index) for part in parts for index in range(len(part))]
    if not places:
      raise UserError('no held-out text: set the held-out fraction above 0, such as 0.05')
    if max_rows is not None and max_rows < 1:
      raise UserError(f'max_rows={max_rows} is below 1: choose such as 64, or None for all')
    count = min(len(places), max_rows or len(places))
    self._places = [places[i * len(places) // count] for i in range(count)]
    self._batch_size = batch_size
    sizes = [(part.process_index, part.local_batch_size(batch_size)) for part in parts_of(shard)]
    # Places of this process's rows in a batch.
    self._own = [index * size + i for index, size in sizes for i in range(size)]
    self._padding = parts[0].padding

  def __len__(self) -> int:
    """Batches in one pass."""
    return -(-len(self._places) // self._batch_size)

  def __iter__(self) -> Iterator[Batch]:
    """Batches `[batch_size / process_count, length]` of NumPy arrays."""
    for step in range(len(self)):
      first = step * self._batch_size
      wanted = [first + own for own in self._own]
      places = [self._places[place] for place in wanted if place < len(self._places)]
      rows = [part[index] for part, index in places]
      yield stack_rows(rows + [self._padding] * (len(self._own) - len(rows)))
