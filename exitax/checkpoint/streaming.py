"""Lazy arrays to disk by way of Orbax, block by block: few blocks are in memory, and no array.

What is written is Orbax's: its metadata, and its layout of one Zarr array per leaf, a file per
block. `store.load_arrays` reads it as it reads everything else, onto any mesh.
"""

from __future__ import annotations

import concurrent.futures
import math
import os
import queue
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from exitax.checkpoint.lazy import Box, LazyArray, block_shape, boxes
from exitax.checkpoint.store import by_group
from exitax.checkpoint.tree import nest

# Large enough for disks and for hashing, small enough that a few blocks per thread are nothing.
BLOCK_BYTES = 16 << 20
# More do not make disks faster, and every thread has blocks of its own.
MAX_THREADS = 4

_types = ocp.type_handlers


def stream_arrays(folder: Path, *, leaves: Mapping[str, LazyArray]) -> None:
  """Writes leaves (by path) below `folder`, which must not exist, and returns when they are on disk.

  All processes call it; process 0 reads and writes.

  Raises:
    Exception: what reading a leaf raised, or the disk; `folder` does not exist then.
  """
  # Orbax refuses arrays without elements; their shape is all there is to know.
  groups = by_group({path: leaf for path, leaf in leaves.items() if leaf.size})
  if not groups:
    return
  registry = _types.create_type_handler_registry(
    (LazyArray, _LazyHandler()),
    # Never used, but Orbax warns of a registry without it.
    (jax.Array, _types.ArrayHandler()),
  )
  handlers: dict[str, Any] = {name: _tree_handler(registry) for name in groups}
  trees = {name: ocp.args.PyTreeSave(nest(members)) for name, members in groups.items()}
  # Folders are there before leaves are: files are written at once.
  options = ocp.CompositeOptions(
    async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False)
  )
  composite = ocp.CompositeCheckpointHandler(composite_options=options, **handlers)
  with ocp.Checkpointer(composite) as checkpointer:
    checkpointer.save(folder, args=ocp.args.Composite(**trees))


def _tree_handler(registry: _types.TypeHandlerRegistry) -> ocp.PyTreeCheckpointHandler:
  handler = ocp.PyTreeCheckpointHandler(
    # A file per block, which is written at once; OCDBT would gather blocks in memory.
    use_ocdbt=False,
    use_zarr3=True,
    use_compression=False,
    type_handler_registry=registry,
  )
  # It would look for parts of OCDBT to merge, and warn that there are none.
  handler.finalize = lambda directory: None
  return handler


class _LazyHandler(_types.NumpyHandler):
  """Writes lazy arrays as Orbax writes NumPy's, and says that they are such.

  It blocks until all is written: an interruption of the caller then interrupts the writing.
  """

  async def serialize(
    self,
    values: Sequence[LazyArray],
    infos: Sequence[_types.ParamInfo],
    args: Sequence[_types.SaveArgs] | None = None,
  ) -> Sequence[Any]:
    if jax.process_index() == 0:
      _write(zip(values, infos, args or [_types.SaveArgs()] * len(values), strict=True))
    return []


def _write(leaves: Iterable[tuple[LazyArray, _types.ParamInfo, _types.SaveArgs]]) -> None:
  threads = min(os.cpu_count() or 1, MAX_THREADS)
  # One more: some always wait for the disk.
  writers = threads + 1
  # Orbax's own context encodes as many blocks at a time as it likes.
  limit = {'limit': threads}
  context = ts.Context({'file_io_concurrency': limit, 'data_copy_concurrency': limit})
  jobs = list(_jobs(leaves, context))
  largest = max(_num_bytes(leaf, box) for leaf, _, box in jobs)
  # Memory that is used again, by whichever thread is free; memory that is new would be slow to get.
  spare: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
  for _ in range(writers):
    spare.put(np.empty(largest, np.uint8))

  def write(job: tuple[LazyArray, ts.TensorStore, Box]) -> None:
    leaf, target, box = job
    buffer = spare.get()
    try:
      shape = tuple(part.stop - part.start for part in box)
      block = buffer[: _num_bytes(leaf, box)].view(leaf.dtype).reshape(shape)
      leaf.read(box, block)
      # Nothing refers to the buffer any more when its file is there, and no block is written twice.
      target[box].write(block, can_reference_source_data_indefinitely=True).result()
    finally:
      spare.put(buffer)

  with concurrent.futures.ThreadPoolExecutor(writers) as pool:
    try:
      for written in [pool.submit(write, job) for job in jobs]:
        written.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _jobs(
  leaves: Iterable[tuple[LazyArray, _types.ParamInfo, _types.SaveArgs]], context: ts.Context
) -> Iterator[tuple[LazyArray, ts.TensorStore, Box]]:
  for leaf, info, arg in leaves:
    block = block_shape(leaf.shape, itemsize=leaf.dtype.itemsize, max_bytes=BLOCK_BYTES)
    spec = _types.get_json_tspec_write(
      info, False, global_shape=leaf.shape, local_shape=block, dtype=leaf.dtype, arg=arg
    )
    target = ts.open(ts.Spec(spec), create=True, open=True, context=context).result()
    for box in boxes(leaf.shape, block=block):
      yield leaf, target, box


def _num_bytes(leaf: LazyArray, box: Box) -> int:
  return math.prod(part.stop - part.start for part in box) * leaf.dtype.itemsize
