"""Rules that map logical axis names to mesh axes: the only place where the two meet.

Layers name the axes of their arrays (`('embed', 'heads', 'kv')`); a rules table says which
mesh axis, if any, shards each name. Worked miniature, with the standard rules:

  parameter  [embed, mlp]                              -> P('data', 'tensor')
  activation [batch, activation_length, activation_embed] -> P('data', 'tensor', None)
  activation [batch, length, mlp]                      -> P('data', None, 'tensor')

Between the second and the third the compiler inserts the all-gather (and on the way back the
reduce-scatter) of sequence parallelism (Korthikanti et al. 2022, arXiv:2205.05198); the shards
of `embed` over `data` are FSDP / ZeRO-3 (Rajbhandari et al. 2020, arXiv:1910.02054).
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from exitax.errors import UserError
from exitax.parallel.mesh import (
  DATA_AXIS,
  MESH_AXES,
  PIPELINE_AXIS,
  TENSOR_AXIS,
  divisors,
  join_choices,
)

LogicalAxes = tuple[str | None, ...]
MeshAxes = tuple[str, ...]


class ParameterSharding(enum.StrEnum):
  """Where parameters (and optimizer state) live along the data axis."""

  FSDP = 'fsdp'
  REPLICATED = 'replicated'


class SequenceSharding(enum.StrEnum):
  """How activations between tensor-parallel regions are laid out along length."""

  TENSOR = 'tensor'
  WHOLE = 'whole'


# Names used by parameters, by activations, or by both; () means never sharded.
_STANDARD: Mapping[str, MeshAxes] = {
  # Both.
  'vocab': (TENSOR_AXIS,),
  'heads': (TENSOR_AXIS,),
  'kv_heads': (TENSOR_AXIS,),
  'kv': (),  # T5X's name for the width of one head.
  'mlp': (TENSOR_AXIS,),
  'exit': (),
  'thinker': (),
  # Parameters.
  'embed': (),
  'norm': (),  # Scales of a norm: too small to be worth gathering.
  'lora': (),  # Rank of an adapter.
  'layers': (PIPELINE_AXIS,),
  'stage': (PIPELINE_AXIS,),
  'vocab_part': (PIPELINE_AXIS, TENSOR_AXIS),  # Of exits whose heads all stages share.
  # Activations. `length` is the whole sequence, as inside attention or mlp, where heads or mlp
  # are sharded; `activation_length` is the sequence between those regions.
  'batch': (DATA_AXIS,),
  'length': (),
  'activation_length': (),
  'activation_embed': (),
}

# What a user calls the size of such a dimension.
_SIZE_NAMES: Mapping[str, str] = {
  'vocab': 'vocab_size',
  'vocab_part': 'vocab_size',
  'embed': 'embed_dim',
  'activation_embed': 'embed_dim',
  'heads': 'num_heads',
  'kv_heads': 'num_kv_heads',
  'kv': 'head_dim',
  'mlp': 'mlp_dim',
  'layers': 'num_layers',
  'stage': 'num_stages',
  'exit': 'num_exits',
  'thinker': 'num_thinkers',
  'batch': 'batch_size',
  'activation_length': 'length',
}


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """A hashable table from logical axis names to mesh axes.

  Attributes:
    parameters: FSDP shards parameters' `embed` over data; REPLICATED copies them.
    sequence: TENSOR shards `activation_length` over tensor (sequence parallelism); WHOLE does not.
    overrides: pairs (logical name, mesh axis, tuple of mesh axes, or None) that replace or extend
      the standard table.
    replicate_if_uneven: logical names whose dimension is replicated where the mesh does not
      divide it; every other name raises. `kv_heads` is one: with fewer key/value heads than tensor
      shards, each shard holds them all. `layers` is another: uneven stages are cut when they run.
  """

  parameters: ParameterSharding = ParameterSharding.FSDP
  sequence: SequenceSharding = SequenceSharding.TENSOR
  overrides: tuple[tuple[str, str | tuple[str, ...] | None], ...] = ()
  replicate_if_uneven: tuple[str, ...] = ('kv_heads', 'layers', 'exit', 'thinker')

  def __post_init__(self) -> None:
    object.__setattr__(self, 'parameters', _member(ParameterSharding, self.parameters))
    object.__setattr__(self, 'sequence', _member(SequenceSharding, self.sequence))
    overrides = tuple((name, _as_axes(name, axes)) for name, axes in self.overrides)
    object.__setattr__(self, 'overrides', overrides)

  @functools.cached_property
  def table(self) -> Mapping[str, MeshAxes]:
    """Logical name -> mesh axes, the empty tuple for a replicated dimension."""
    table = dict(_STANDARD)
    if self.parameters is ParameterSharding.FSDP:
      table['embed'] = (DATA_AXIS,)
    if self.sequence is SequenceSharding.TENSOR:
      table['activation_length'] = (TENSOR_AXIS,)
    for name, axes in self.overrides:
      table[name] = _as_axes(name, axes)
    return table

  def mesh_axes(self, name: str | None) -> MeshAxes:
    """Mesh axes that shard a logical axis; `None` is an unnamed, replicated dimension.

    Raises:
      UserError: the name is in no rule.
    """
    if name is None:
      return ()
    if name not in self.table:
      known = ', '.join(sorted(self.table))
      raise UserError(f'logical axis {name!r} is in no sharding rule: known are {known}')
    return self.table[name]


def logical_to_spec(axes: Sequence[str | None], rules: ShardingRules) -> PartitionSpec:
  """The partition spec of an array with these logical axes, one entry per dimension.

  Raises:
    UserError: unknown name, or two dimensions of one array on one mesh axis.
  """
  owner: dict[str, str] = {}
  entries = []
  for dim, name in enumerate(axes):
    mesh_axes = rules.mesh_axes(name)
    for mesh_axis in mesh_axes:
      if mesh_axis in owner:
        raise UserError(
          f'logical axes {_show(axes)}: {owner[mesh_axis]} and dimension {dim} ({name!r}) both '
          f'map to mesh axis {mesh_axis!r}: override the rule of one of them'
        )
      owner[mesh_axis] = f'dimension {dim} ({name!r})'
    entries.append(mesh_axes)
  return _spec(entries)


def check_divisible(
  shape: Sequence[int],
  axes: Sequence[str | None],
  mesh: Mesh | AbstractMesh,
  rules: ShardingRules,
  name: str,
) -> None:
  """Passes if the mesh divides every sharded dimension of the array called `name`.

  Dimensions listed in `rules.replicate_if_uneven` always pass.

  Raises:
    UserError: a mesh size does not divide a dimension, or ranks differ.
  """
  spec_for_shape(shape, axes, mesh, rules, name)


def spec_for_shape(
  shape: Sequence[int],
  axes: Sequence[str | None],
  mesh: Mesh | AbstractMesh,
  rules: ShardingRules,
  name: str,
  common: Mapping[MeshAxes, int] | None = None,
) -> PartitionSpec:
  """The spec of one array of known shape, uneven dimensions replicated where the rules allow it.

  Args:
    shape: of the array.
    axes: logical names.
    mesh: the mesh to shard over.
    rules: which mesh axis shards which name.
    name: of the array, for messages.
    common: `common_divisors` of the tree that it belongs to: what messages can recommend.

  Raises:
    UserError: a mesh size does not divide a dimension, ranks differ, unknown name, collision.
  """
  check_rank(shape, axes, name)
  logical_to_spec(axes, rules)
  entries = []
  for size, axis in zip(shape, axes, strict=True):
    mesh_axes = rules.mesh_axes(axis)
    divides = size % _shards(mesh_axes, mesh) == 0
    if not divides and axis not in rules.replicate_if_uneven:
      largest = (common or {}).get(mesh_axes, size)
      raise UserError(f'{name}: {_uneven(size, str(axis), mesh_axes, mesh, largest)}')
    entries.append(mesh_axes if divides else ())
  return _spec(entries)


def common_divisors(
  arrays: Iterable[tuple[Sequence[int], Sequence[str | None]]], rules: ShardingRules
) -> dict[MeshAxes, int]:
  """For each choice of mesh axes, the largest number that divides all dimensions that they shard.

  Args:
    arrays: shape and logical names of each.
    rules: which mesh axis shards which name.
  """
  common: dict[MeshAxes, int] = {}
  for shape, axes in arrays:
    for size, axis in zip(shape, axes, strict=False):  # Ranks that differ are told elsewhere.
      if axis not in rules.replicate_if_uneven:
        mesh_axes = rules.mesh_axes(axis)
        common[mesh_axes] = math.gcd(common.get(mesh_axes, 0), size)
  return common


def even_spec(
  shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh | AbstractMesh, rules: ShardingRules
) -> PartitionSpec:
  """The spec with every uneven dimension replicated: for activations, whose layout is a hint.

  Mesh axes that are manual (inside `jax.shard_map`) are left out: the array is already a shard.
  """
  logical_to_spec(axes, rules)
  manual = set(mesh.manual_axes) if isinstance(mesh, AbstractMesh) else set()
  entries = []
  for size, axis in zip(shape, axes, strict=True):
    mesh_axes = tuple(a for a in rules.mesh_axes(axis) if a not in manual)
    entries.append(mesh_axes if size % _shards(mesh_axes, mesh) == 0 else ())
  return _spec(entries)


def check_rank(shape: Sequence[int], axes: Sequence[str | None], name: str) -> None:
  """Passes if there is one logical axis per dimension; else raises ValueError naming both."""
  if len(shape) != len(axes):
    raise ValueError(f'{name}: shape {tuple(shape)} needs {len(shape)} axes, got {_show(axes)}')


def _spec(entries: Sequence[MeshAxes]) -> PartitionSpec:
  unwrapped = [axes[0] if len(axes) == 1 else (axes or None) for axes in entries]
  return PartitionSpec(*unwrapped)


def _shards(mesh_axes: MeshAxes, mesh: Mesh | AbstractMesh) -> int:
  return math.prod(mesh.shape[axis] for axis in mesh_axes)


def _uneven(
  size: int, axis: str, mesh_axes: MeshAxes, mesh: Mesh | AbstractMesh, largest: int
) -> str:
  sizes = ' x '.join(f'{mesh_axis}={mesh.shape[mesh_axis]}' for mesh_axis in mesh_axes)
  choices = [d for d in divisors(largest) if d <= max(mesh.size, 8)]
  return (
    f'{sizes} does not divide {_SIZE_NAMES.get(axis, axis)}={size}: choose {join_choices(choices)}'
  )


def _show(axes: Sequence[str | None]) -> str:
  return f'[{", ".join(str(axis) for axis in axes)}]'


def _as_axes(name: str, axes: str | tuple[str, ...] | None) -> MeshAxes:
  wrapped = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
  for axis in wrapped:
    if axis not in MESH_AXES:
      raise UserError(f'rule {name!r} names mesh axis {axis!r}: choose {", ".join(MESH_AXES)}')
  return wrapped


_Choice = TypeVar('_Choice', bound=enum.StrEnum)


def _member(kind: type[_Choice], value: str) -> _Choice:
  try:
    return kind(value)
  except ValueError:
    choices = ', '.join(repr(member.value) for member in kind)
    raise UserError(f'{kind.__name__} {value!r} is not known: choose {choices}') from None
