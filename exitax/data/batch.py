"""The one structure that data hands to a training or an evaluation step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Origins:
  """Whose each token is, in rows that the texts of a group share: the fields of `layers.Origin`.

  Attributes:
    owner: int32 `[batch, length]`, the thinker, or -1 for the prompt.
    step: int32, the thinker's tokens before it; -1 in the prompt.
    rank: int32, order within a step.
    lag: int32, of a query: it sees tokens of others that are at least so many steps old.
    by_rank: bool, of a query: of the same step it sees those of lower rank.
    sees_all: bool, of a query: it sees everything.
  """

  owner: np.ndarray | jax.Array
  step: np.ndarray | jax.Array
  rank: np.ndarray | jax.Array
  lag: np.ndarray | jax.Array
  by_rank: np.ndarray | jax.Array
  sees_all: np.ndarray | jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """Packed rows of token ids: a JAX pytree of five arrays of the same shape.

  Miniature: documents `a b` and `c d e` in one row of eight, `^` the start id, `$` the end id,
  `.` padding (see `exitax.data.packing` for the rule):

    tokens       ^ a b $ ^ c d e      (the last `$` starts the next row)
    targets      a b $ . c d e $
    segment_ids  1 1 1 1 2 2 2 2
    positions    0 1 2 3 0 1 2 3
    weights      1 1 1 0 1 1 1 1

  Attributes:
    tokens: int32 `[batch, length]`, the input ids; the pad id where there is no document.
    targets: int32 `[batch, length]`, the id to predict; the pad id where there is none.
    segment_ids: int32 `[batch, length]`, 1, 2, ... for the documents of a row, 0 for padding.
      Attention is allowed only between positions of the same id.
    positions: int32 `[batch, length]`, 0, 1, ... restarting with every document piece.
    weights: float32 `[batch, length]`, 1 where the target counts, else 0.
    origin: of rows that the texts of a group share (see `exitax.data.group_rows`); None elsewhere.
  """

  tokens: np.ndarray | jax.Array
  targets: np.ndarray | jax.Array
  segment_ids: np.ndarray | jax.Array
  positions: np.ndarray | jax.Array
  weights: np.ndarray | jax.Array
  origin: Origins | None = None


def stack_rows(rows: Sequence[Batch]) -> Batch:
  """Rows, each with arrays `[length]`, stacked into one batch `[len(rows), length]`."""
  return jax.tree.map(lambda *parts: np.stack(parts), *rows)


def concatenate(batches: Sequence[Batch]) -> Batch:
  """The rows of several batches, one after the other."""
  return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


def empty_row(*, length: int, pad_id: int) -> Batch:
  """A row `[length]` of padding only: segment 0 and weight 0 everywhere."""
  return Batch(
    tokens=np.full(length, pad_id, np.int32),
    targets=np.full(length, pad_id, np.int32),
    segment_ids=np.zeros(length, np.int32),
    positions=np.zeros(length, np.int32),
    weights=np.zeros(length, np.float32),
  )
