"""Arrays on disk by way of Orbax; `streaming` writes those that are made on the way.

The state's top-level children are stored apart (`params.tree/`, `opt_state.tree/`), so that reading
the parameters neither reads nor hashes the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from exitax.checkpoint.tree import SEPARATOR, named_leaves, nest

# Leaves that lie directly in the state, such as its step counter.
_LOOSE = '_'
# The suffix keeps names of the state out of the way of those that Orbax reserves ('metrics').
_SUFFIX = '.tree'
# Several files of this size hash in parallel; one large file would not.
_DATA_FILE_BYTES = 128 << 20


def save_arrays(folder: Path, *, leaves: Mapping[str, Any]) -> Callable[[], None]:
  """Starts writing leaves (by path) below `folder`, which must not exist, and returns at once.

  Accelerator arrays have been copied to the host when this returns. All processes call it.

  Returns:
    A function that blocks until all processes have written everything, and raises what went wrong.
  """
  # Orbax refuses arrays without elements; their shape is all there is to know.
  solid = {path: leaf for path, leaf in leaves.items() if leaf.size}
  trees = {name: nest(members) for name, members in by_group(solid).items()}
  if not trees:
    return lambda: None
  with _context():
    response = ocp.save_checkpointables_async(str(folder), trees)
  return response.result


def load_arrays(folder: Path, *, abstract_leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
  """Reads the leaves named in `abstract_leaves`, each into its sharding. All processes call it.

  Args:
    folder: as passed to `save_arrays`.
    abstract_leaves: `jax.ShapeDtypeStruct` by path; without a sharding, a leaf goes to the first
      local device. Shapes and dtypes must be those saved.
  """
  placed = {path: _with_sharding(leaf) for path, leaf in abstract_leaves.items()}
  leaves = {path: _empty(leaf) for path, leaf in placed.items() if not leaf.size}
  solid = {path: leaf for path, leaf in placed.items() if leaf.size}
  wanted = {name: nest(members) for name, members in by_group(solid).items()}
  if not wanted:
    return leaves
  with _context():
    loaded = ocp.load_checkpointables(str(folder), wanted)
  for name, tree in loaded.items():
    prefix = '' if name == _LOOSE + _SUFFIX else name.removesuffix(_SUFFIX) + SEPARATOR
    leaves.update({prefix + path: leaf for path, leaf in named_leaves(tree).items()})
  return leaves


def is_needed_for(name: str, *, paths: Iterable[str]) -> bool:
  """Whether the file `name`, relative to the arrays' folder, is read to load leaves at `paths`."""
  folder, _, _ = name.partition(SEPARATOR)
  return not folder.endswith(_SUFFIX) or folder in {_group_of(path) for path in paths}


def by_group(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Leaves by the name that Orbax stores them under together, and their paths below it."""
  groups: dict[str, dict[str, Any]] = {}
  for path, leaf in leaves.items():
    head, separator, rest = path.partition(SEPARATOR)
    groups.setdefault(_group_of(path), {})[rest if separator else head] = leaf
  return groups


def _context() -> ocp.Context:
  context = ocp.Context()
  # Weights hardly compress, and the processors are busy with training.
  context.array.saving.use_compression = False
  context.array.saving.ocdbt_target_data_file_size = _DATA_FILE_BYTES
  # With directories made in the background, an error in `save` leaves threads that wait for them
  # for minutes, and the process cannot end.
  context.asynchronous.create_directories_asynchronously = False
  context.pytree.loading.partial_load = True
  return context


def _group_of(path: str) -> str:
  head, separator, _ = path.partition(SEPARATOR)
  return (head if separator else _LOOSE) + _SUFFIX


def _with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, 'sharding', None) or jax.sharding.SingleDeviceSharding(
    jax.local_devices()[0]
  )
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _empty(leaf: jax.ShapeDtypeStruct) -> jax.Array:
  return jax.device_put(jax.numpy.zeros(leaf.shape, leaf.dtype), leaf.sharding)
