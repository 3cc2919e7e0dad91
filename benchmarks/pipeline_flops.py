"""What a pipelined step executes, against the least it must; bubbles; what exits add to a tick.

  python benchmarks/pipeline_flops.py [--quick]

Nothing is run: flops are counted in the traced step, loops multiplied out.

1. Executed flops per device over (ticks of the table) x (least flops of the dearest stage), for every
   way of recomputation and every schedule. The least is written down from the model's sizes: a layer
   forward, twice that backward, once more for what is computed again, and the stage's part of the
   scores. Idle ticks are in the ticks, so they count in the bubble alone.
2. The bubble of the executed table against (P - 1) / (v M + P - 1).
3. The critical path of EE-LLM's models with an exit on every stage, over that without exits, both
   with the better placement of the scores. No schedule can do better than to spread all work evenly:
   that bound stands beside it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from common import Effort, Goal, effort_from_arguments, finish, say

from exitax.data import DataConfig
from exitax.layers.causal import attention_blocks
from exitax.models import ExitConfig, ModelConfig
from exitax.objectives import ExitWeight, ObjectiveConfig, VocabPlacement
from exitax.parallel import (
  MeshConfig,
  ScheduleKind,
  bubble_formula,
  count_flops,
  emulate_devices,
  make_mesh,
  make_schedule,
  use,
)
from exitax.training import LoopConfig, PipelineConfig, Recompute, RunConfig, assemble

STAGES, TENSOR, LENGTH = 4, 2, 256
SMALL = ModelConfig(
  vocab_size=2048,
  num_layers=8,
  embed_dim=128,
  num_heads=4,
  mlp_dim=352,
  max_length=LENGTH,
  tie_embeddings=False,
  exits=(ExitConfig(layer=2), ExitConfig(layer=4)),
)
# Forwards of the layers per microbatch, forward and backward ticks together; a backward is two.
FORWARDS = {Recompute.NONE: 3, Recompute.STAGE: 4, Recompute.LAYER: 4}
# Width, layers, heads, mlp of the models that EE-LLM trained (gin/models/ee_*.gin).
LARGE = {
  '1.3B': (2048, 24, 32, 5440),
  '7B': (4096, 32, 32, 10880),
  '13B': (5120, 40, 40, 13632),
  '30B': (6656, 60, 52, 17728),
}


def main() -> None:
  """Counts, and prints tables, goals and JSON."""
  quick = effort_from_arguments(__doc__) is Effort.QUICK
  emulate_devices(STAGES * TENSOR)
  executed = [
    executed_row(recompute, schedule)
    for recompute in Recompute
    for schedule in (ScheduleKind.ONE_F_ONE_B, *(() if quick else _others()))
  ]
  bubbles = bubble_rows(quick)
  sizes = list(LARGE)[: 1 if quick else None]
  critical = [critical_row(size) for size in sizes]

  def worst(recompute: Recompute) -> float:
    return max(row['over least'] for row in executed if row['recompute'] == recompute.value)

  finish(
    'pipeline_flops',
    [*executed, *bubbles, *critical],
    [
      Goal(name='none_over_minimum', value=worst(Recompute.NONE), op='<=', goal=1.02),
      Goal(name='stage_over_minimum', value=worst(Recompute.STAGE), op='<=', goal=1.02),
      Goal(name='layer_over_minimum', value=worst(Recompute.LAYER), op='<=', goal=1.02),
      Goal(
        name='bubble_error', value=max(row['bubble error'] for row in bubbles), op='<=', goal=0.001
      ),
      Goal(
        name='one_exit_per_stage_overhead',
        value=max(row['exits over none'] for row in critical),
        op='<=',
        goal=1.01,
      ),
    ],
  )


def executed_row(recompute: Recompute, schedule: ScheduleKind) -> dict[str, Any]:
  """Executed flops of one layout against the least."""
  chunks = 2 if schedule is ScheduleKind.INTERLEAVED else 1
  pipeline = PipelineConfig(
    schedule=schedule, num_microbatches=8, num_chunks=chunks, recompute=recompute
  )
  run = make_run(SMALL, MeshConfig(1, STAGES, TENSOR), pipeline, rows=16)
  executed, num_ticks = executed_flops(run)
  layers = SMALL.num_layers // (STAGES * chunks)
  rows = 16 // 8
  forwards = FORWARDS.get(recompute)
  row: dict[str, Any] = {
    'recompute': recompute.value,
    'schedule': schedule.value,
    'ticks': num_ticks,
    'gflops': executed / 1e9,
  }
  # Every stage's part of all exits' scores: a product and its two gradients.
  num_exits = len(SMALL.exits) + 1
  scores = 3 * 2 * rows * LENGTH * SMALL.embed_dim * SMALL.vocab_size * num_exits / STAGES
  if forwards is None:
    # Of weight products nothing is computed again; of attention's two products one forward.
    least = layers * rows * (3 * weight_flops(SMALL) + 4 * attention_flops(SMALL)) + scores
  else:
    least = forwards * layers * rows * (weight_flops(SMALL) + attention_flops(SMALL)) + scores
  if recompute is Recompute.LAYER:
    # What a layer's last product gives is read by the next layer alone: not computed again.
    least -= layers * rows * 2 * LENGTH * SMALL.embed_dim * SMALL.mlp_dim
  row['over least'] = executed / (num_ticks * least / TENSOR)
  return row


def bubble_rows(quick: bool) -> list[dict[str, Any]]:
  """Bubbles of tables against the formula."""
  rows = []
  for kind in ScheduleKind:
    chunks = 3 if kind is ScheduleKind.INTERLEAVED else 1
    errors = []
    for stages in (2, 4) if quick else (2, 3, 4, 8):
      for microbatches in (stages, 4 * stages, 8 * stages):
        table = make_schedule(
          kind, num_stages=stages, num_microbatches=microbatches, num_chunks=chunks
        )
        formula = bubble_formula(stages, microbatches, chunks)
        errors += [
          abs(table.bubble_fraction(backward_over_forward=ratio) - formula)
          for ratio in (1.0, 2.0, 3.0)
        ]
    rows.append({'schedule': kind.value, 'tables': len(errors), 'bubble error': max(errors)})
  return rows


def critical_row(size: str) -> dict[str, Any]:
  """One of EE-LLM's models: a tick of the dearest stage with an exit on every stage, and without."""
  width, layers, heads, mlp = LARGE[size]
  base = ModelConfig(
    vocab_size=32000,
    num_layers=layers,
    embed_dim=width,
    num_heads=heads,
    mlp_dim=mlp,
    max_length=2048,
    tie_embeddings=False,
  )
  share = layers // STAGES
  exits = tuple(ExitConfig(layer=share * stage) for stage in range(1, STAGES))
  ticks = {}
  for name, config in (('none', base), ('exits', dataclasses.replace(base, exits=exits))):
    by_place = {}
    for vocab in VocabPlacement:
      say(f'tracing {size}, {name}, scores by {vocab.value}')
      pipeline = PipelineConfig(num_microbatches=STAGES, recompute=Recompute.NONE, vocab=vocab)
      run = make_run(config, MeshConfig(1, STAGES, 1), pipeline, rows=STAGES)
      executed, num_ticks = executed_flops(run, STAGES)
      by_place[vocab.value] = executed / num_ticks
    ticks[name] = min(by_place.values())
    ticks[f'{name} by'] = min(by_place, key=lambda place: by_place[place])
    ticks[f'{name} by stage'] = by_place[VocabPlacement.STAGE.value]
  layer = 3 * (weight_flops(base) + attention_flops(base))
  score = 3 * 2 * base.max_length * width * base.vocab_size
  even = (layers * layer + STAGES * score) / (layers * layer + score)
  return {
    'model': size,
    'scores, exits': ticks['exits by'],
    'scores, none': ticks['none by'],
    'exits over none': ticks['exits'] / ticks['none'],
    'least possible': even,
    'over scores on the last stage': ticks['exits'] / ticks['none by stage'],
  }


def make_run(
  model: ModelConfig, mesh: MeshConfig, pipeline: PipelineConfig, *, rows: int
) -> RunConfig:
  """A run whose step is traced."""
  return RunConfig(
    model=model,
    data=DataConfig(batch_size=rows, length=model.max_length),
    loop=LoopConfig(train_steps=1),
    objective=ObjectiveConfig(exit_weights=(ExitWeight(start=0.25),) * len(model.exits)),
    mesh=mesh,
    pipeline=pipeline,
  )


def executed_flops(run: RunConfig, num_devices: int = STAGES * TENSOR) -> tuple[float, int]:
  """Flops of one device in one step, and ticks with a forward (and as many with a backward)."""
  mesh = make_mesh(run.mesh, jax.devices()[:num_devices])
  assembly = assemble(run, mesh)
  with use(mesh, run.sharding):
    found = count_flops(assembly.step, assembly.abstract_state(), assembly.abstract_batch())
  if found.num_open_loops or assembly.pipelined is None:
    raise SystemExit('a loop without a bound, or no pipeline: nothing to compare')
  forward = assembly.pipelined.schedule.forward.busy.any(axis=1).sum()
  return found.flops / num_devices, int(forward)


def weight_flops(config: ModelConfig) -> float:
  """Products with weights of one layer and row, forward."""
  heads = config.num_heads + 2 * config.num_kv_heads
  attention = config.embed_dim * config.head_dim * (heads + config.num_heads)
  return 2.0 * config.max_length * (attention + 3 * config.embed_dim * config.mlp_dim)


def attention_flops(config: ModelConfig) -> float:
  """Products of queries, keys and values of one layer and row, forward: blocks that are not skipped."""
  pairs = sum((stop - start) * stop for start, stop in attention_blocks(config.max_length))
  return 2.0 * 2 * pairs * config.num_heads * config.head_dim


def _others() -> tuple[ScheduleKind, ...]:
  return ScheduleKind.GPIPE, ScheduleKind.INTERLEAVED


if __name__ == '__main__':
  main()
