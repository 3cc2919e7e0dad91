"""Shardings of whole trees: parameters, optimizer state, batches, and initialisation in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from exitax.errors import UserError
from exitax.parallel.batch_blocks import BatchBlocks, batch_blocks
from exitax.parallel.rules import ShardingRules, common_divisors, logical_to_spec, spec_for_shape

PyTree = Any


def path_name(path: tuple[Any, ...]) -> str:
  """A key path as users read it: 'blocks/attention/query/kernel'."""
  return '/'.join(_key_name(entry) for entry in path)


def tree_shardings(
  abstract_tree: PyTree, logical_axes_tree: PyTree, mesh: Mesh, rules: ShardingRules
) -> PyTree:
  """A tree of `NamedSharding` shaped like `abstract_tree`.

  Args:
    abstract_tree: arrays or `jax.ShapeDtypeStruct`s.
    logical_axes_tree: the same tree with a tuple of logical names (or a `PartitionSpec` of them)
      where the arrays are.
    mesh: the mesh to shard over.
    rules: which mesh axis shards which name. A dimension that the mesh does not divide raises,
      unless its name is in `rules.replicate_if_uneven`.

  Raises:
    UserError: a mesh size does not divide a dimension, unknown name, collision.
    ValueError: the two trees differ.
  """
  leaves, treedef = jax.tree.flatten_with_path(abstract_tree)
  axes_leaves = treedef.flatten_up_to(logical_axes_tree)
  named = [
    (path_name(path), leaf.shape, tuple(axes))
    for (path, leaf), axes in zip(leaves, axes_leaves, strict=True)
  ]
  common = common_divisors([(shape, axes) for _, shape, axes in named], rules)
  shardings = [
    NamedSharding(mesh, spec_for_shape(shape, axes, mesh, rules, name, common))
    for name, shape, axes in named
  ]
  return treedef.unflatten(shardings)


def init_sharded(
  init_fn: Callable[[jax.Array], PyTree],
  key: jax.Array,
  logical_axes_tree: PyTree,
  mesh: Mesh,
  rules: ShardingRules,
) -> PyTree:
  """`init_fn(key)`, each device computing only its own shards; values do not depend on the mesh.

  eval_shape -> specs -> jit with out_shardings, so the whole tree never exists on one device.
  Equality across meshes rests on threefry keys with `jax_threefry_partitionable`, which is
  switched on here whatever the ambient setting; other key types (`rbg`) do not promise it.

  Args:
    init_fn: pure function from a typed key to a tree of arrays.
    key: typed key (`jax.random.key`), the same on every process.
    logical_axes_tree: see `tree_shardings`.
    mesh: the mesh to shard over.
    rules: see `tree_shardings`.
  """
  abstract_tree = jax.eval_shape(init_fn, key)
  shardings = tree_shardings(abstract_tree, logical_axes_tree, mesh, rules)
  impl = jax.random.key_impl(key)

  def init(key_data: jax.Array) -> PyTree:
    return init_fn(jax.random.wrap_key_data(key_data, impl=impl))

  # The key travels as NumPy data: a key on one device is no valid input to a mesh that spans
  # processes, equal host values on every process are.
  with jax.threefry_partitionable(True):
    program = jax.jit(init, out_shardings=shardings, compiler_options=_quick_to_compile(mesh))
    return program(np.asarray(jax.random.key_data(key)))


def shardings_like(state_shape: PyTree, params_shape: PyTree, params_shardings: PyTree) -> PyTree:
  """Shardings of a state that holds copies of the parameters, such as optimizer moments.

  A leaf whose path ends in a parameter's path and has its shape is laid out as that parameter;
  the longest such parameter path counts. Every other leaf (step counts, scales, factored
  moments) is replicated.

  Worked miniature: parameter `embed/kernel` gives its sharding to `0/mu/embed/kernel` and
  `0/nu/embed/kernel`; `0/count` is replicated.
  """
  params = {
    _key_names(path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree.leaves_with_path(params_shape), jax.tree.leaves(params_shardings), strict=True
    )
  }
  mesh = next(iter(params.values()))[1].mesh
  whole = NamedSharding(mesh, PartitionSpec())

  def sharding_of(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    names = _key_names(path)
    suffixes = (names[start:] for start in range(len(names) + 1))
    shape, sharding = next((params[s] for s in suffixes if s in params), (None, whole))
    return sharding if shape == leaf.shape else whole

  return jax.tree.map_with_path(sharding_of, state_shape)


def shard_batch(batch: PyTree, mesh: Mesh, rules: ShardingRules) -> PyTree:
  """Global arrays from this process's rows; `batch` leaves are `[batch, length, ...]` NumPy.

  With several processes each passes the rows of its `batch_blocks`, one block after the other, so
  processes that share a data coordinate (they differ in pipeline or tensor only) pass the same
  rows. The row order of the global batch does not depend on the number of processes.

  Raises:
    UserError: the rows of this process do not spread evenly over its share of the data axis.
  """
  blocks = batch_blocks(mesh, rules)
  return jax.tree.map(lambda leaf: _shard_rows(np.asarray(leaf), mesh, rules, blocks), batch)


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def _quick_to_compile(mesh: Mesh) -> dict[str, int]:
  """Options for a program that runs once: on CPU, 3 to 4 times less time in LLVM, as fast a run."""
  on_cpu = mesh.devices.flat[0].platform == 'cpu'
  return {'xla_backend_optimization_level': 1} if on_cpu else {}


def _shard_rows(
  rows: np.ndarray, mesh: Mesh, rules: ShardingRules, blocks: BatchBlocks
) -> jax.Array:
  axes = ('batch', 'length')[: rows.ndim] + (None,) * max(0, rows.ndim - 2)
  sharding = NamedSharding(mesh, logical_to_spec(axes, rules))
  if not rows.ndim:
    return jax.make_array_from_callback((), sharding, lambda index: rows[index])
  _check_rows(rows.shape[0], mesh, rules.mesh_axes('batch'), blocks)
  size = rows.shape[0] // len(blocks.own)
  shape = (size * blocks.total, *rows.shape[1:])

  def of_device(index: Any) -> np.ndarray:
    first = index[0].start or 0
    if index[0].stop is None:  # All rows, which this process then has.
      return rows[index]
    here = blocks.own.index(first // size) * size
    return rows[(slice(here, here + size), *index[1:])]

  return jax.make_array_from_callback(shape, sharding, of_device)


def check_batch_size(
  batch_size: int, mesh: Mesh, rules: ShardingRules, *, name: str = 'batch_size'
) -> None:
  """Passes if the rows of a global batch spread evenly over the mesh.

  Args:
    batch_size: rows.
    mesh: the devices.
    rules: which axes hold the rows.
    name: what messages call the number.

  Raises:
    UserError: they do not.
  """
  axes = rules.mesh_axes('batch')
  total = math.prod(mesh.shape[axis] for axis in axes)
  if batch_size < 1 or batch_size % total:
    raise UserError(_uneven(batch_size, mesh, axes, total, name))


def _check_rows(num_rows: int, mesh: Mesh, mesh_axes: tuple[str, ...], blocks: BatchBlocks) -> None:
  if num_rows == 0 or num_rows % len(blocks.own):
    batch_size = num_rows * blocks.total // len(blocks.own)
    raise UserError(_uneven(batch_size, mesh, mesh_axes, blocks.total))


def _uneven(
  batch_size: int, mesh: Mesh, mesh_axes: tuple[str, ...], total: int, name: str = 'batch_size'
) -> str:
  sizes = ' x '.join(f'{axis}={mesh.shape[axis]}' for axis in mesh_axes)
  return f'{sizes} does not divide {name}={batch_size}: choose a multiple of {total}'


def _key_names(path: tuple[Any, ...]) -> tuple[str, ...]:
  return tuple(_key_name(entry) for entry in path)


def _key_name(entry: Any) -> str:
  return jax.tree_util.keystr((entry,), simple=True)
