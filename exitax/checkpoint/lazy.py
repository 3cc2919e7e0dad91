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

  An array on an accelerator comes to the host box by box.
  """
  if isinstance(leaf, LazyArray):
    return leaf

  def read(box: Box, out: np.ndarray) -> None:
    if isinstance(leaf, jax.Array):
      # Compiled once for each shape of a box, not for each place.
      starts, sizes = [part.start for part in box], out.shape
      out[...] = np.asarray(jax.lax.dynamic_slice(leaf, starts, sizes))
    else:
      out[...] = leaf[box]

  return LazyArray(shape=tuple(leaf.shape), dtype=np.dtype(leaf.dtype), read=read)


def block_shape(shape: tuple[int, ...], *, itemsize: int, max_bytes: int) -> tuple[int, ...]:
  """Sizes of the blocks that an array is written in: whole rows, as many as fit.

  Leading axes are cut before later ones, so that a block is contiguous: leaves stacked by layer
  fall into layers, and a layer that is too large into its rows.

    [16, 2048, 8192] of 2 bytes, at most 32 MiB  ->  [1, 2048, 8192]
    [16, 2048] of 2 bytes                        ->  [16, 2048]
    [128256, 2048] of 2 bytes                    ->  [8016, 2048], 16 of them

  A last block that is not full is stored as if it was: sizes that divide the axis are looked for
  among up to twice as many blocks as there must be.

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
    even = (count for count in range(fewest, 2 * fewest) if size % count == 0)
    sizes[axis] = -(-size // min(next(even, fewest), size))
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
