"""Weights straight from mapped files to where they belong: shards of a mesh, blocks of a checkpoint."""

from __future__ import annotations

import concurrent.futures
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from exitax.checkpoint import Box, LazyArray
from exitax.convert.safetensors_file import DTYPES, TensorEntry
from exitax.convert.tensors import TensorPlace, tensor_places
from exitax.errors import UserError
from exitax.models import ExitLM, ModelConfig, Params
from exitax.parallel import ShardingRules, path_name, tree_shardings

# Told the bytes that have come since it was told last.
ReportFn = Callable[[int], None]

# Tensors that are in some checkpoints and hold nothing: tables that are computed.
_COMPUTED = ('rotary_emb.inv_freq',)
_TIED_HEAD = 'lm_head.weight'
# Names in one message; the rest are counted.
_MAX_NAMED = 4
# Rows and columns of a matrix that are transposed together: they stay in the caches.
_ROWS, _COLUMNS = 512, 256
# Behind each row of a block: rows a power of two apart would share few lines of a cache.
_PADDING = 40
# XLA on the CPU takes memory as it is if it begins at a multiple of this.
_ALIGNMENT = 64


def quiet(num_bytes: int) -> None:
  """A `ReportFn` that tells nobody."""
  del num_bytes


def check_tensors(config: ModelConfig, tensors: Mapping[str, TensorEntry]) -> None:
  """Passes if a checkpoint has the tensors of a model, and no others.

  Raises:
    UserError: names the tensors that are missing, or extra, or of another shape or dtype.
  """
  places = {place.name: place for group in tensor_places(config).values() for place in group}
  missing = [name for name in places if name not in tensors]
  if missing:
    raise UserError(f'the checkpoint lacks {_named(missing)}: fetch it again, or mend config.json')
  computed = [name for name in tensors if name.endswith(_COMPUTED)]
  extra = [name for name in tensors if name not in places and name not in computed]
  if config.tie_embeddings and _TIED_HEAD in extra:
    _check_tied(tensors)
    extra.remove(_TIED_HEAD)
  if extra:
    raise UserError(
      f'the checkpoint has {_named(extra)}, for which the model that config.json describes has no place'
    )
  for name, place in places.items():
    entry = tensors[name]
    if entry.shape != place.shape:
      raise UserError(
        f'{name} is {list(entry.shape)} in the checkpoint, {list(place.shape)} by config.json'
      )
    if entry.dtype not in DTYPES:
      raise UserError(
        f'{name} is of dtype {entry.dtype}: {", ".join(DTYPES)} are read (quantised checkpoints '
        'are not: take the original weights)'
      )


def read_params(
  model: ExitLM,
  tensors: Mapping[str, TensorEntry],
  *,
  mesh: Mesh,
  rules: ShardingRules,
  dtype: Any = None,
  report: ReportFn = quiet,
) -> Params:
  """The parameters of a model, each device holding only its own shards.

  Beside the result, no memory is taken but for a block per core and pages of the files, which the system can
  drop.

  Args:
    model: of the checkpoint's configuration.
    tensors: after `check_tensors`.
    mesh: where the parameters go.
    rules: how they are sharded.
    dtype: of all parameters; None keeps bfloat16 and makes float32 of everything else.
    report: told of progress.
  """
  places = tensor_places(model.config)
  shapes = model.abstract_params()
  shardings = tree_shardings(shapes, model.logical_axes(), mesh, rules)
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

    def leaf(path: Any, shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
      group = places[path_name(path)]
      kept = dtype or kept_dtype({tensors[place.name].dtype for place in group})

      def shard(index: Any) -> np.ndarray:
        return _read_shard(group, tensors, shape.shape, index, kept, pool, report)

      return jax.make_array_from_callback(shape.shape, sharding, shard)

    return jax.tree.map_with_path(leaf, shapes, shardings)


def lazy_params(
  config: ModelConfig,
  tensors: Mapping[str, TensorEntry],
  *,
  dtype: Any = None,
  report: ReportFn = quiet,
) -> Params:
  """The parameters of a model as `LazyArray`s, which read the files when they are written.

  Arguments are those of `read_params`.
  """
  places = tensor_places(config)

  def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> LazyArray:
    group = places[path_name(path)]
    kept = np.dtype(dtype or kept_dtype({tensors[place.name].dtype for place in group}))

    def read(box: Box, out: np.ndarray) -> None:
      for place, target, part in _jobs(group, box, out):
        copy_tensor(target, place, tensors[place.name], part)
      report(out.nbytes)

    return LazyArray(shape=shape.shape, dtype=kept, read=read)

  return jax.tree.map_with_path(leaf, ExitLM(config).abstract_params())


def kept_dtype(names: set[str]) -> np.dtype:
  """Format that parameters are kept in: bfloat16 if all of theirs are, else float32, which holds both."""
  return np.dtype(jnp.bfloat16) if names == {'BF16'} else np.dtype(np.float32)


def copy_transposed(target: np.ndarray, source: np.ndarray) -> None:
  """`target[...] = source.T` of matrices, block by block: several times as fast as in one go."""
  block = np.empty((_ROWS, _COLUMNS + _PADDING), source.dtype)
  for row in range(0, source.shape[0], _ROWS):
    for column in range(0, source.shape[1], _COLUMNS):
      part = source[row : row + _ROWS, column : column + _COLUMNS]
      rows, columns = part.shape
      block[:rows, :columns] = part
      target[column : column + columns, row : row + rows] = block[:rows, :columns].T


def copy_tensor(target: np.ndarray, place: TensorPlace, entry: TensorEntry, part: Box = ()) -> None:
  """A tensor, or a part of it, into the leaf (or its row) that it is.

  Args:
    target: of the part's shape, contiguous.
    place: of the tensor.
    entry: where its bytes are.
    part: slices of the leaf's axes, or of its row's; none takes it whole.
  """
  tensor = entry.read()
  if place.num_in and target.shape[1:] == place.leaf_shape[1:]:
    # Rows of the leaf are columns of the tensor.
    step = math.prod(place.leaf_shape[1 : place.num_in])
    start = (part[0].start or 0) * step if part else 0
    columns = tensor[:, start : start + target.shape[0] * step]
    copy_transposed(target.reshape(columns.shape[::-1]), columns)
  else:
    target[...] = place.from_torch(tensor)[part]


def _jobs(
  group: Sequence[TensorPlace], box: Box, target: np.ndarray
) -> Iterator[tuple[TensorPlace, np.ndarray, Box]]:
  """The tensors that a box of a leaf is made of, where each goes, and which part of it."""
  if group[0].layer is None:
    yield group[0], target, box
  else:
    first = box[0].start or 0
    for row, place in zip(target, group[first : first + len(target)], strict=True):
      yield place, row, box[1:]


def _read_shard(
  group: Sequence[TensorPlace],
  tensors: Mapping[str, TensorEntry],
  shape: tuple[int, ...],
  box: Box,
  dtype: np.dtype,
  pool: concurrent.futures.Executor,
  report: ReportFn,
) -> np.ndarray:
  """One device's part of a leaf."""
  bounds = [part.indices(size) for part, size in zip(box, shape, strict=True)]
  shard = _aligned(tuple(stop - start for start, stop, _ in bounds), dtype)
  jobs = list(_jobs(group, box, shard))

  def fill(job: tuple[TensorPlace, np.ndarray, Box]) -> None:
    place, target, part = job
    copy_tensor(target, place, tensors[place.name], part)
    report(target.nbytes)

  # A whole leaf is cut into rows, so that all cores copy.
  if len(jobs) == 1 and shard.ndim > 1:
    jobs = _rows(jobs[0])
  list(pool.map(fill, jobs))
  return shard


def _rows(
  job: tuple[TensorPlace, np.ndarray, Box], pieces: int = 16
) -> list[tuple[TensorPlace, np.ndarray, Box]]:
  place, target, part = job
  start = part[0].start or 0
  step = max(1, -(-target.shape[0] // pieces))
  return [
    (
      place,
      target[i : i + step],
      (slice(start + i, start + min(i + step, target.shape[0])), *part[1:]),
    )
    for i in range(0, target.shape[0], step)
  ]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  raw = np.empty(size + _ALIGNMENT, np.uint8)
  offset = -raw.ctypes.data % _ALIGNMENT
  return raw[offset : offset + size].view(dtype).reshape(shape)


def _check_tied(tensors: Mapping[str, TensorEntry]) -> None:
  embed = tensors['model.embed_tokens.weight']
  head = tensors[_TIED_HEAD]
  # A part at a time: what a comparison makes has half the size of its tensors.
  parts = [slice(start, start + _ROWS) for start in range(0, embed.shape[0], _ROWS)]
  if embed.shape != head.shape or not all(
    np.array_equal(embed.read()[part], head.read()[part]) for part in parts
  ):
    raise UserError(
      f'config.json ties the embeddings, and {_TIED_HEAD} is not the input embedding: '
      'set tie_word_embeddings to false in it'
    )


def _named(names: Sequence[str]) -> str:
  rest = len(names) - _MAX_NAMED
  return ', '.join(names[:_MAX_NAMED]) + (f' and {rest} more' if rest > 0 else '')
