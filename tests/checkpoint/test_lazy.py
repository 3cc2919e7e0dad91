"""How arrays are cut into blocks."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from exitax.checkpoint.lazy import LazyArray, as_lazy, block_shape, boxes

SHAPES = [
  (),
  (7,),
  (16, 8),
  (16, 64, 32),
  (13, 20, 10),
  (3, 151, 6),
  (5, 4, 3, 1000),
  (1, 1, 4096),
  (1021, 6),
]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('max_bytes', [1, 100, 1000, 10**9])
def test_blocks_are_whole_rows_that_cover_everything_once(
  shape: tuple[int, ...], max_bytes: int
) -> None:
  block = block_shape(shape, itemsize=2, max_bytes=max_bytes)
  assert math.prod(block) * 2 <= max(max_bytes, 2)
  covered = np.zeros(shape, np.int32)
  for box in boxes(shape, block=block):
    assert covered[box].flags.c_contiguous
    # Contiguous in the leaf too: behind the first axis that is cut, none is.
    cut = [axis for axis, size in enumerate(block) if size > 1]
    assert not cut or block[cut[0] + 1 :] == shape[cut[0] + 1 :]
    covered[box] += 1
  assert (covered == 1).all()


@pytest.mark.parametrize(
  ('shape', 'block'),
  [
    ((16, 2048, 8192), (1, 1024, 8192)),
    ((16, 2048, 512), (8, 2048, 512)),
    ((16, 2048), (16, 2048)),
    ((128256, 2048), (4008, 2048)),
    # Thirteen layers of which four would fit: seven blocks of two waste one row, four of four three.
    ((13, 2048, 1024), (2, 2048, 1024)),
  ],
)
def test_known_blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
  assert block_shape(shape, itemsize=2, max_bytes=16 << 20) == block


def test_an_array_as_a_lazy_one() -> None:
  array = np.arange(4 * 6 * 5, dtype=np.float32).reshape(4, 6, 5)
  box = (slice(1, 3), slice(2, 6), slice(0, 5))
  for given in (array, jnp.asarray(array)):
    leaf = as_lazy(given)
    assert (leaf.shape, leaf.dtype, leaf.size, leaf.nbytes) == ((4, 6, 5), np.float32, 120, 480)
    out = np.empty((2, 4, 5), np.float32)
    leaf.read(box, out)
    np.testing.assert_array_equal(out, array[box])
    assert as_lazy(leaf) is leaf
  assert isinstance(as_lazy(np.float32(3.0)), LazyArray)
