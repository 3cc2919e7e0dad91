"""What lies where: one row per parameter, with bytes per device, as data and as aligned text."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from exitax.parallel.rules import LogicalAxes, MeshAxes, ShardingRules, spec_for_shape
from exitax.parallel.sharding import path_name


@dataclasses.dataclass(frozen=True)
class ParameterRow:
  """One array of a tree.

  Attributes:
    path: 'blocks/mlp/up/kernel'.
    shape: global shape.
    dtype: name of the element type.
    logical_axes: one name or None per dimension.
    mesh_axes: per dimension, the mesh axes of size above 1 that shard it.
    num_elements: global count.
    bytes_per_device: size of one device's shard.
    bytes_total: size of the array, counted once however often it is replicated.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  logical_axes: LogicalAxes
  mesh_axes: tuple[MeshAxes, ...]
  num_elements: int
  bytes_per_device: int
  bytes_total: int


@dataclasses.dataclass(frozen=True)
class ParameterReport:
  """Rows in tree order, and the mesh they refer to (axis name -> size)."""

  rows: tuple[ParameterRow, ...]
  mesh_shape: tuple[tuple[str, int], ...]

  @property
  def num_elements(self) -> int:
    """Parameters in all."""
    return sum(row.num_elements for row in self.rows)

  @property
  def bytes_per_device(self) -> int:
    """What one device holds."""
    return sum(row.bytes_per_device for row in self.rows)

  @property
  def bytes_total(self) -> int:
    """What one full copy takes."""
    return sum(row.bytes_total for row in self.rows)


def parameter_report(
  abstract_tree: Any, logical_axes_tree: Any, mesh: Mesh | AbstractMesh, rules: ShardingRules
) -> ParameterReport:
  """Rows for every array of `abstract_tree`; nothing is allocated, the mesh may be abstract.

  Raises:
    UserError: as `tree_shardings`.
  """
  leaves, treedef = jax.tree.flatten_with_path(abstract_tree)
  axes_leaves = treedef.flatten_up_to(logical_axes_tree)
  rows = tuple(
    _row(path_name(path), leaf, tuple(axes), mesh, rules)
    for (path, leaf), axes in zip(leaves, axes_leaves, strict=True)
  )
  return ParameterReport(rows=rows, mesh_shape=tuple(mesh.shape.items()))


def render_report(report: ParameterReport) -> str:
  """The report as a table with aligned columns, a line of totals and a line for the mesh."""
  header = ('parameter', 'shape', 'dtype', 'logical axes', 'mesh axes', 'per device', 'total')
  body = [_cells(row) for row in report.rows]
  totals = (
    'total',
    f'{report.num_elements:,}',
    '',
    '',
    '',
    format_bytes(report.bytes_per_device),
    format_bytes(report.bytes_total),
  )
  widths = [max(len(line[column]) for line in (header, *body, totals)) for column in range(7)]
  rule = '  '.join('-' * width for width in widths)
  lines = [_align(header, widths), rule, *(_align(line, widths) for line in body), rule]
  mesh = ' x '.join(f'{axis}={size}' for axis, size in report.mesh_shape)
  return '\n'.join([*lines, _align(totals, widths), f'mesh {mesh}'])


def format_bytes(count: int) -> str:
  """1536 -> '1.5 KiB'."""
  if count < 1024:
    return f'{count} B'
  exponent = min(4, (count.bit_length() - 1) // 10)
  return f'{count / 1024**exponent:.1f} {"KMGT"[exponent - 1]}iB'


def _row(
  path: str, leaf: Any, axes: LogicalAxes, mesh: Mesh | AbstractMesh, rules: ShardingRules
) -> ParameterRow:
  spec = spec_for_shape(leaf.shape, axes, mesh, rules, path)
  mesh_axes = tuple(_sharding_axes(entry, mesh) for entry in spec)
  shards = math.prod(mesh.shape[axis] for dim in mesh_axes for axis in dim)
  num_elements = math.prod(leaf.shape)
  num_bytes = num_elements * np.dtype(leaf.dtype).itemsize
  return ParameterRow(
    path=path,
    shape=tuple(leaf.shape),
    dtype=np.dtype(leaf.dtype).name,
    logical_axes=axes,
    mesh_axes=mesh_axes,
    num_elements=num_elements,
    bytes_per_device=num_bytes // shards,
    bytes_total=num_bytes,
  )


def _sharding_axes(entry: Any, mesh: Mesh | AbstractMesh) -> MeshAxes:
  axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
  return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def _cells(row: ParameterRow) -> tuple[str, ...]:
  return (
    row.path,
    'x'.join(str(size) for size in row.shape) or 'scalar',
    row.dtype,
    ' '.join(axis or '-' for axis in row.logical_axes),
    ' '.join('+'.join(axes) or '-' for axes in row.mesh_axes),
    format_bytes(row.bytes_per_device),
    format_bytes(row.bytes_total),
  )


def _align(cells: tuple[str, ...], widths: list[int]) -> str:
  """Text columns to the left, the two byte columns to the right."""
  left = [cell.ljust(width) for cell, width in zip(cells[:5], widths[:5], strict=True)]
  right = [cell.rjust(width) for cell, width in zip(cells[5:], widths[5:], strict=True)]
  return '  '.join([*left, *right])
