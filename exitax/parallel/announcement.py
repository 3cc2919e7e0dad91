"""A few words per row from one device to all others of a mesh axis, in one small all-reduce."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def announce(words: PyTree, speaks: jax.Array, *, axis: str) -> PyTree:
  """Per row, the words of the device that speaks for it, on every device of a manual mesh axis.

  Words travel as bits, which are added to zeros: no float is rounded, and a NaN arrives as it was.

  Worked miniature, two devices and two rows: speaks (on device 0: True, False; on device 1: False,
  False) and words (7, 8 and 9, 9) give 7, 0 on both.

  Args:
    words: tree of int32 and float32 arrays `[rows, ...]`.
    speaks: bool `[rows]`, on one device at most for each row; where on none, words are zeros.
    axis: name of the mesh axis.
  """
  leaves, treedef = jax.tree.flatten(words)
  rows = speaks.shape[0]
  sizes = [math.prod(leaf.shape[1:]) for leaf in leaves]
  bits = [_as_bits(x).reshape(rows, size) for x, size in zip(leaves, sizes, strict=True)]
  said = jnp.where(speaks[:, None], jnp.concatenate(bits, axis=1), 0)
  heard = jax.lax.psum(said, axis)
  stops = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
  parts = jnp.split(heard, stops, axis=1)
  return treedef.unflatten(
    [
      jax.lax.bitcast_convert_type(part, leaf.dtype).reshape(leaf.shape)
      for part, leaf in zip(parts, leaves, strict=True)
    ]
  )


def _as_bits(leaf: jax.Array) -> jax.Array:
  if leaf.dtype not in (jnp.int32, jnp.float32):
    raise ValueError(f'words are int32 or float32, not {leaf.dtype}')
  return jax.lax.bitcast_convert_type(leaf, jnp.int32)
