"""Mesh, sharding rules and layout: how arrays lie on devices. Knows no layers or models."""

from __future__ import annotations

from exitax.parallel.constraint import constrain, current_rules, use
from exitax.parallel.mesh import MESH_AXES, MeshConfig, make_mesh
from exitax.parallel.rules import (
  LogicalAxes,
  ParameterSharding,
  SequenceSharding,
  ShardingRules,
  check_divisible,
  logical_to_spec,
)

__all__ = [
  # Mesh.
  'MESH_AXES',
  'MeshConfig',
  'make_mesh',
  # Rules.
  'LogicalAxes',
  'ParameterSharding',
  'SequenceSharding',
  'ShardingRules',
  'check_divisible',
  'logical_to_spec',
  # Ambient mesh and rules.
  'constrain',
  'current_rules',
  'use',
]
