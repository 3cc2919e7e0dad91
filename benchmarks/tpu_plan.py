"""EE-LLM's four models compiled for TPU slices: memory, what exits add, 1F1B against GPipe.

  python benchmarks/tpu_plan.py [--quick]

Needs the TPU compiler (pip install "exitax[plan]"), and no TPU: the real training step of
gin/models/ee_*.gin with gin/parallel/*_ee_*.gin is compiled ahead of time for the slice, with and
without exits. Planned counts a model if it takes less than 70 % of a chip's memory and the compiler
rematerialised nothing. The ratio of exits is (peak - what the exits' own parameters take: float32
weights, two moments and the compute copy and gradients of a stage) / peak without exits. Compiling
takes one to three minutes a step on two cores; --quick takes the smallest model alone.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
from common import Effort, Goal, effort_from_arguments, finish, say

from exitax.commands import gin_config
from exitax.models import ExitLM
from exitax.objectives import ObjectiveConfig
from exitax.parallel import ScheduleKind, has_tpu_compiler, make_mesh, parameter_report
from exitax.planning import COMFORTABLE, Plan, find_target, make_plan
from exitax.training import RunConfig

MODELS = {
  'ee_1p3b': ('v5e:4x4', 'v5e_4x4_ee_1p3b'),
  'ee_7b': ('v6e:4x4', 'v6e_4x4_ee_7b'),
  'ee_13b': ('v5p:2x2x2', 'v5p_2x2x2_ee_13b'),
  'ee_30b': ('v5p:2x2x4', 'v5p_2x2x4_ee_30b'),
}
_UNREAD = {'MODEL_DIR': 'unused', 'MIXTURE_OR_TASK_NAME': 'unused', 'TRAIN_STEPS': 100_000}


def main() -> None:
  """Compiles, and prints table, goals and JSON."""
  quick = effort_from_arguments(__doc__) is Effort.QUICK
  if not has_tpu_compiler():
    sys.exit('the TPU compiler is not installed: pip install "exitax[plan]"')
  names = list(MODELS)[: 1 if quick else None]
  rows, ratios, num_planned = [], [], 0
  for name in names:
    with_exits, without = plan_of(name, exits=True), plan_of(name, exits=False)
    row = row_of(name, with_exits)
    own = own_bytes(with_exits)
    row['exits ratio'] = (peak(with_exits) - own) / peak(without)
    row['own GiB'] = own / 2**30
    ratios.append(row['exits ratio'])
    num_planned += row['share'] < COMFORTABLE and row['computed twice'] == 0
    rows.append(row)
  rows += largest_batches(names[0])
  finish(
    'tpu_plan',
    rows,
    [
      Goal(name='exits_memory_ratio', value=max(ratios), op='<=', goal=1.02),
      Goal(name='planned_sizes', value=num_planned, op='>=', goal=4),
    ],
  )


def run_of(name: str) -> RunConfig:
  """The run of a model on its slice."""
  gin_config.parse(
    [f'models/{name}.gin', f'parallel/{MODELS[name][1]}.gin'],
    [],
    text="include 'runs/pretrain.gin'",
    if_required=_UNREAD,
  )
  return gin_config.build(RunConfig)


def plan_of(name: str, *, exits: bool) -> Plan:
  """The compiled step, with or without its exits."""
  run = run_of(name)
  if not exits:
    model = dataclasses.replace(run.model, exits=())
    run = dataclasses.replace(run, model=model, objective=ObjectiveConfig())
  say(f'compiling {name} {"with" if exits else "without"} exits for {MODELS[name][0]}')
  return make_plan(run, find_target(MODELS[name][0]))


def row_of(name: str, plan: Plan) -> dict[str, Any]:
  """What a plan found."""
  assert plan.compiled is not None
  estimate = plan.estimate
  return {
    'model': name,
    'slice': plan.target.name,
    'mesh': ' x '.join(str(size) for size in plan.run.mesh.sizes.values()),
    'peak GiB': peak(plan) / 2**30,
    'share': plan.share or 0.0,
    'estimated GiB': estimate.memory.total / 2**30,
    'computed twice': plan.compiled.num_rematerialised,
    'bubble': estimate.bubble,
    'step s at least': estimate.time.step if estimate.time else None,
    'MFU at most': estimate.mfu,
    'compile s': plan.compiled.seconds,
  }


def peak(plan: Plan) -> int:
  """Bytes of a device."""
  if plan.memory_bytes is None:
    raise SystemExit(f'{plan.target.name}: the compiler does not say how much is missing')
  return plan.memory_bytes


def own_bytes(plan: Plan) -> float:
  """What the exits' own parameters take on a device."""
  run = plan.run
  mesh = make_mesh(run.mesh, plan.target.devices)
  shapes, axes = (
    {'exits': tree.get('exits', {})}
    for tree in (ExitLM(run.model).abstract_params(), ExitLM(run.model).logical_axes())
  )
  sharded = parameter_report(shapes, axes, mesh, run.sharding).bytes_per_device
  sizes = run.mesh.sizes
  # On a stage, whole over data: matrices are cut over pipeline and tensor.
  elements = sum(x.size for x in jax.tree.leaves(shapes)) / (sizes['pipeline'] * sizes['tensor'])
  # Master weights and two moments; compute copy, float32 sum, the gradient of one microbatch.
  return 3 * sharded + elements * (2 + 4 + 2)


def largest_batches(name: str) -> list[dict[str, Any]]:
  """The most microbatches that the compiler fits, doubling from four, by schedule."""
  rows = []
  for schedule in (ScheduleKind.GPIPE, ScheduleKind.ONE_F_ONE_B):
    largest, plan = 0, None
    for microbatches in (4, 8, 16, 32, 64, 128):
      run = run_of(name)
      data = run.mesh.data
      rows_each = run.data.batch_size // (data * run.pipeline.num_microbatches)
      pipeline = dataclasses.replace(run.pipeline, schedule=schedule, num_microbatches=microbatches)
      batch = dataclasses.replace(run.data, batch_size=rows_each * data * microbatches)
      run = dataclasses.replace(run, pipeline=pipeline, data=batch)
      # A long 1F1B step takes what a short one takes: the ends are enough.
      if schedule is ScheduleKind.ONE_F_ONE_B and microbatches not in (4, 128):
        continue
      say(f'compiling {schedule.value} of {microbatches} microbatches')
      plan = make_plan(run, find_target(MODELS[name][0]))
      if not plan.fits:
        break
      largest = run.data.batch_size
      found = peak(plan)
    rows.append(
      {
        'model': name,
        'schedule': schedule.value,
        'largest batch': f'{largest} rows' + ('' if plan and not plan.fits else ' or more'),
        'peak GiB': found / 2**30 if largest else None,
      }
    )
  return rows


if __name__ == '__main__':
  main()
