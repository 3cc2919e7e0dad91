"""Arrays that are made while they are written, box by box, so that no whole one is ever in memory."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

# One slice with start and stop per axis.
Box = tuple[slice, ...]
# Fills the array, of the box's shape and the leaf's dtype, with what the leaf has there.
ReadFn = Callable[[Box, np.ndarray], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LazyArray:
  """A leaf of a state that nobody holds.

  Attributes:
    shape: of the whole array.
    dtype: of its elements.
    read: fills a contiguous array with a box of it; called from several threads at once.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: ReadFn

  @property
  def size(self) -> int:
    """Elements of the whole array."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of the whole array."""
    return self.size * self.dtype.itemsize


def as_lazy(leaf: Any) -> LazyArray:
  """A lazy view of an array, which must not change before it is written; lazy ones stay as they are.

  An array on accelerators comes to the host box by box.

  Raises:
    ValueError: other processes have a part of the array.
  """
  if isinstance(leaf, LazyArray):
    return leaf
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    raise ValueError('an array of several processes cannot be written block by block: use save')

  def read(box: Box, out: np.ndarray) -> None:
    if isinstance(leaf, jax.Array):
      _copy_box(leaf, box, out)
    else:
      out[...] = leaf[box]

  return LazyArray(shape=tuple(leaf.shape), dtype=np.dtype(leaf.dtype), read=read)


def block_shape(shape: tuple[int, ...], *, itemsize: int, max_bytes: int) -> tuple[int, ...]:
  """Sizes of the blocks that an array is written in: whole rows, as many as fit.

  Leading axes are cut before later ones, so that a block is contiguous: leaves stacked by layer
  fall into layers, and a layer that is too large into its rows.

    [16, 2048, 8192] of 2 bytes, at most 16 MiB  ->  [1, 1024, 8192], 2 per layer
    [16, 2048, 512] of 2 bytes                   ->  [8, 2048, 512]
    [128256, 2048] of 2 bytes                    ->  [4008, 2048], 32 of them

  A last block that is not full is stored as if it was: of all numbers of blocks up to twice the
  least, the one that wastes least is taken.

  Args:
    shape: of the array.
    itemsize: bytes of an element.
    max_bytes: of a block, but for a single element.
  """
  sizes = list(shape)
  for axis, size in enumerate(shape):
    row = math.prod(shape[axis + 1 :]) * itemsize
    if size * row <= max_bytes:
      break
    fewest = -(-size // max(1, max_bytes // row))
    steps = (-(-size // count) for count in range(fewest, 2 * fewest))
    sizes[axis] = min(steps, key=lambda step: -size % step)
    if row <= max_bytes:
      break
  return tuple(sizes)


def boxes(shape: tuple[int, ...], *, block: tuple[int, ...]) -> Iterator[Box]:
  """The blocks of an array in C order."""
  axes = (
    [slice(start, min(start + step, size)) for start in range(0, size, step)]
    for size, step in zip(shape, block, strict=True)
  )
  return itertools.product(*axes)


def _copy_box(array: jax.Array, box: Box, out: np.ndarray) -> None:
  """A box of an array from the shards that have it."""
  for shard in array.addressable_shards:
    own = [part.indices(size) for part, size in zip(shard.index, array.shape, strict=True)]
    firsts = [max(part.start, start) for part, (start, _, _) in zip(box, own, strict=True)]
    ends = [min(part.stop, stop) for part, (_, stop, _) in zip(box, own, strict=True)]
    sizes = [end - first for first, end in zip(firsts, ends, strict=True)]
    if shard.replica_id or any(size <= 0 for size in sizes):
      continue
    # Compiled once for each shape of a box, not for each place.
    starts = [first - start for first, (start, _, _) in zip(firsts, own, strict=True)]
    values = jax.lax.dynamic_slice(shard.data, starts, sizes)
    places = zip(firsts, ends, box, strict=True)
    out[tuple(slice(first - part.start, end - part.start) for first, end, part in places)] = values
