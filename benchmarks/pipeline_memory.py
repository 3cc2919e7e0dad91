"""Temporary memory of a pipelined step: flat in the number of microbatches, and hardly more with exits.

  python benchmarks/pipeline_memory.py [--quick]

16 layers of width 512, vocabulary 8192, rows of 512 tokens, on eight emulated devices as 4 stages x
2 tensor shards. Nothing is run: the compiled step says what each device allocates beside arguments
and results. A microbatch is one row, so that more of them are a larger batch; exits stand before
the second and the third stage and read the final head's matrix.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
from common import Effort, Goal, effort_from_arguments, finish, say

from exitax.data import Batch
from exitax.layers import Precision
from exitax.models import ExitConfig, ExitLM, ModelConfig
from exitax.objectives import ExitWeight, ObjectiveConfig
from exitax.parallel import (
  MeshConfig,
  ScheduleKind,
  ShardingRules,
  emulate_devices,
  make_mesh,
  tree_shardings,
  use,
)
from exitax.training import PipelineConfig, PipelinedObjective

CONFIG = ModelConfig(
  vocab_size=8192,
  num_layers=16,
  embed_dim=512,
  num_heads=8,
  mlp_dim=1408,
  max_length=512,
  tie_embeddings=False,
  precision=Precision.BFLOAT16,
)
EXITS = (ExitConfig(layer=4), ExitConfig(layer=8))
LENGTH = 512
MESH = MeshConfig(data=1, pipeline=4, tensor=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One compiled step."""

  schedule: ScheduleKind
  exits: tuple[ExitConfig, ...]
  num_microbatches: int


def main() -> None:
  """Compiles every case and prints table, goals and JSON."""
  quick = effort_from_arguments(__doc__) is Effort.QUICK
  emulate_devices(8)
  counts = (4, 8) if quick else (4, 8, 16, 32)
  cases = [
    Case(schedule=schedule, exits=exits, num_microbatches=count)
    for schedule in (ScheduleKind.ONE_F_ONE_B, ScheduleKind.GPIPE)
    for exits in ((), EXITS)
    for count in counts
  ]
  rows = [measure(case) for case in cases]
  found = {
    (case.schedule, bool(case.exits), case.num_microbatches): row
    for case, row in zip(cases, rows, strict=True)
  }
  flat = [found[ScheduleKind.ONE_F_ONE_B, True, count]['temporary_mb'] for count in counts]
  ratios = [
    (
      found[ScheduleKind.ONE_F_ONE_B, True, n]['temporary_mb']
      - found[ScheduleKind.ONE_F_ONE_B, True, n]['own_exits_mb']
    )
    / found[ScheduleKind.ONE_F_ONE_B, False, n]['temporary_mb']
    for n in counts
  ]
  finish(
    'pipeline_memory',
    rows,
    [
      Goal(name='growth_1f1b', value=max(flat) / min(flat), op='<=', goal=1.02),
      Goal(name='exits_memory_ratio', value=max(ratios), op='<=', goal=1.03),
    ],
  )


def measure(case: Case) -> dict[str, Any]:
  """A row of the table."""
  say(
    f'compiling {case.schedule.value}, {len(case.exits)} exits, {case.num_microbatches} microbatches'
  )
  model = ExitLM(dataclasses.replace(CONFIG, exits=case.exits))
  objective = ObjectiveConfig(exit_weights=(ExitWeight(start=0.25),) * len(case.exits))
  mesh, rules = make_mesh(MESH), ShardingRules()
  with use(mesh, rules):
    pipelined = PipelinedObjective(
      model,
      mesh,
      rules,
      objective=objective,
      pipeline=PipelineConfig(
        schedule=case.schedule,
        num_microbatches=case.num_microbatches,
      ),
    )
    shapes = model.abstract_params()
    layout = tree_shardings(shapes, model.logical_axes(), mesh, rules)
    params = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, layout
    )
    program = jax.jit(pipelined.value_and_grad, out_shardings=(None, layout))
    compiled = program.lower(params, _batch(case.num_microbatches), _weights(case)).compile()
  analysis = compiled.memory_analysis()
  if analysis is None:
    sys.exit('this backend does not report memory')
  own = sum(x.size for x in jax.tree.leaves(shapes.get('exits', {})))
  return {
    'schedule': case.schedule.value,
    'exits': len(case.exits),
    'microbatches': case.num_microbatches,
    'temporary_mb': analysis.temp_size_in_bytes / 1e6,
    # Compute copy, float32 sum and the gradient of one microbatch.
    'own_exits_mb': own * (2 + 4 + 4) / 1e6,
    'bubble': pipelined.schedule.bubble_fraction(),
    'in_flight': pipelined.schedule.num_slots,
  }


def _batch(rows: int) -> Batch:
  def array(dtype: Any) -> Any:
    return jax.ShapeDtypeStruct((rows, LENGTH), dtype)

  whole = {name: array(jnp.int32) for name in ('tokens', 'targets', 'segment_ids', 'positions')}
  return Batch(**whole, weights=array(jnp.float32))


def _weights(case: Case) -> Any:
  return jax.ShapeDtypeStruct((len(case.exits) + 1,), jnp.float32)


if __name__ == '__main__':
  main()
