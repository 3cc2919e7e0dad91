"""Mesh, sharding rules and layout: how arrays lie on devices. Knows no layers or models."""

from __future__ import annotations

from exitax.parallel.agreement import (
  any_process,
  check_same,
  do_together,
  fetch,
  from_main_process,
  raise_together,
)
from exitax.parallel.announcement import announce
from exitax.parallel.batch_blocks import BatchBlocks, batch_blocks
from exitax.parallel.bubble_filling import fill_bubbles, max_extras
from exitax.parallel.chips import CHIPS, Chip, find_chip, measure_matmul_flops, peak_flops
from exitax.parallel.collectives import Collective, collectives_in
from exitax.parallel.constraint import (
  ambient_spec,
  constrain,
  current_rules,
  mesh_sizes,
  per_shard,
  shards_of,
  use,
)
from exitax.parallel.distributed import ProcessConfig, join_processes, leave
from exitax.parallel.emulation import COLLECTIVES_IN_ORDER, emulate_devices
from exitax.parallel.exchange import gather_parameter, gather_stages, reduce_gradient
from exitax.parallel.flops import FlopCount, count_flops, count_jaxpr_flops
from exitax.parallel.mesh import (
  DATA_AXIS,
  MESH_AXES,
  PIPELINE_AXIS,
  TENSOR_AXIS,
  MeshConfig,
  divisors,
  make_mesh,
)
from exitax.parallel.pipeline import Keep, PipelineResult, StageProgram, run_pipeline
from exitax.parallel.report import (
  ParameterReport,
  ParameterRow,
  format_bytes,
  parameter_report,
  render_report,
)
from exitax.parallel.residuals import residuals_of
from exitax.parallel.roll_call import hold_roll_call
from exitax.parallel.rules import (
  LogicalAxes,
  ParameterSharding,
  SequenceSharding,
  ShardingRules,
  check_divisible,
  logical_to_spec,
)
from exitax.parallel.schedule import (
  Schedule,
  ScheduleKind,
  WorkItem,
  WorkKind,
  WorkTable,
  bubble_formula,
  forward_schedule,
  make_schedule,
  render_schedule,
)
from exitax.parallel.sharding import (
  check_batch_size,
  init_sharded,
  path_name,
  replicated,
  shard_batch,
  shardings_like,
  tree_shardings,
)
from exitax.parallel.topology import (
  Topology,
  has_tpu_compiler,
  larger_slices,
  parse_topology,
  tpu_devices,
)

__all__ = [
  # Mesh.
  'COLLECTIVES_IN_ORDER',
  'DATA_AXIS',
  'MESH_AXES',
  'PIPELINE_AXIS',
  'TENSOR_AXIS',
  'MeshConfig',
  'divisors',
  'emulate_devices',
  'make_mesh',
  # Rules.
  'LogicalAxes',
  'ParameterSharding',
  'SequenceSharding',
  'ShardingRules',
  'check_divisible',
  'logical_to_spec',
  # Ambient mesh and rules.
  'ambient_spec',
  'constrain',
  'current_rules',
  'mesh_sizes',
  'per_shard',
  'shards_of',
  'use',
  # Trees.
  'init_sharded',
  'path_name',
  'replicated',
  'shard_batch',
  'shardings_like',
  'tree_shardings',
  # Several processes.
  'BatchBlocks',
  'ProcessConfig',
  'any_process',
  'batch_blocks',
  'check_batch_size',
  'check_same',
  'do_together',
  'fetch',
  'from_main_process',
  'hold_roll_call',
  'join_processes',
  'leave',
  'raise_together',
  # Pipeline.
  'Keep',
  'PipelineResult',
  'Schedule',
  'ScheduleKind',
  'StageProgram',
  'WorkItem',
  'WorkKind',
  'WorkTable',
  'announce',
  'bubble_formula',
  'fill_bubbles',
  'forward_schedule',
  'gather_parameter',
  'gather_stages',
  'make_schedule',
  'max_extras',
  'reduce_gradient',
  'render_schedule',
  'residuals_of',
  'run_pipeline',
  # Reports.
  'ParameterReport',
  'ParameterRow',
  'format_bytes',
  'parameter_report',
  'render_report',
  # Cost.
  'CHIPS',
  'Chip',
  'Collective',
  'FlopCount',
  'collectives_in',
  'count_flops',
  'count_jaxpr_flops',
  'find_chip',
  'measure_matmul_flops',
  'peak_flops',
  # Slices that are not here.
  'Topology',
  'has_tpu_compiler',
  'larger_slices',
  'parse_topology',
  'tpu_devices',
]
