"""Parameters to safetensors shards, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from exitax.convert.folder import INDEX_FILE, WEIGHTS_FILE
from exitax.convert.reading import ReportFn
from exitax.convert.safetensors_file import DTYPES, dtype_name, write_file
from exitax.convert.tensors import TensorPlace, is_of_exits, tensor_places
from exitax.models import ModelConfig, Params
from exitax.parallel import path_name

# transformers' own bound: what a download restarts with when it breaks.
SHARD_BYTES = 5_000_000_000
_ROWS = 1024  # Of a transposed matrix, that are in memory at once.


def write_backbone(
  folder: Path,
  config: ModelConfig,
  params: Params,
  *,
  dtype: str | None,
  shard_bytes: int,
  report: ReportFn,
) -> None:
  """Writes `model.safetensors`, or shards with an index.

  Args:
    folder: where to.
    config: of the model.
    params: with stacked blocks.
    dtype: of all tensors (a name of the safetensors format); None keeps each one's own.
    shard_bytes: most bytes of one file, but for a single tensor.
    report: told the bytes that have been written since it was told last.
  """
  tensors = _tensors(config, params, dtype=dtype, exits=False)
  shards = _cut(tensors, shard_bytes)
  if len(shards) == 1:
    _write(folder / WEIGHTS_FILE, shards[0], {'format': 'pt'}, report)
    return
  index: dict[str, Any] = {
    'metadata': {'total_size': sum(tensor.num_bytes for tensor in tensors)},
    'weight_map': {},
  }
  for number, shard in enumerate(shards, start=1):
    name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    _write(folder / name, shard, {'format': 'pt'}, report)
    index['weight_map'] |= {tensor.place.name: name for tensor in shard}
  (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + '\n')


def write_exits(
  path: Path,
  config: ModelConfig,
  params: Params,
  *,
  metadata: Mapping[str, str],
  dtype: str | None,
  report: ReportFn,
) -> None:
  """Writes the exits' tensors into one file; arguments as `write_backbone`."""
  _write(path, _tensors(config, params, dtype=dtype, exits=True), metadata, report)


class _Tensor:
  """One tensor of the checkpoint and the leaf that it comes from."""

  def __init__(self, place: TensorPlace, leaf: jax.Array, dtype: str | None) -> None:
    self.place, self._leaf = place, leaf
    self.dtype = dtype or dtype_name(leaf.dtype)
    self.num_bytes = int(np.prod(place.shape)) * DTYPES[self.dtype].itemsize

  def pieces(self) -> Iterator[np.ndarray]:
    """Rows of the tensor, made when they are asked for."""
    row = self._leaf if self.place.layer is None else self._leaf[self.place.layer]
    tensor = self.place.to_torch(np.asarray(row))
    for start in range(0, tensor.shape[0], _ROWS):
      yield np.ascontiguousarray(tensor[start : start + _ROWS], DTYPES[self.dtype])


def _tensors(
  config: ModelConfig, params: Params, *, dtype: str | None, exits: bool
) -> list[_Tensor]:
  leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
  return [
    _Tensor(place, leaves[path], dtype)
    for path, group in tensor_places(config).items()
    for place in group
    if is_of_exits(place.name) == exits
  ]


def _cut(tensors: Sequence[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
  shards: list[list[_Tensor]] = [[]]
  size = 0
  for tensor in tensors:
    if shards[-1] and size + tensor.num_bytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(tensor)
    size += tensor.num_bytes
  return shards


def _write(
  path: Path, tensors: Sequence[_Tensor], metadata: Mapping[str, str], report: ReportFn
) -> None:
  def told(tensor: _Tensor) -> Iterator[np.ndarray]:
    for piece in tensor.pieces():
      yield piece
      report(piece.nbytes)

  write_file(
    path,
    [(tensor.place.name, tensor.dtype, tensor.place.shape, told(tensor)) for tensor in tensors],
    metadata=metadata,
  )
