"""Compiles the training step for a slice of TPUs that need not be here, and says what it takes.

  exitax plan --topology=v5e:4x4 --gin_file=gin/models/ee_1p3b.gin
    --gin_file=gin/parallel/v5e_4x4_ee_1p3b.gin
  exitax plan --topology=v5p:4x4x4 --gin_file=gin/models/ee_7b.gin --search
    --gin.BATCH_SIZE=2048 --gin.TASK_FEATURE_LENGTHS="{'targets': 2048}"

Bytes per device against the chip's memory, flops, collectives, the pipeline's bubble and schedule,
and a bound on the step's time from the chip's data sheet. Nothing is trained and no data is read.
Without --topology the plan is for the devices that are here (or --emulate_devices=N). The TPU
compiler comes with `pip install "exitax[plan]"`; without it the plan is made on emulated CPU devices.

Exit status: 0, or 1 if the step does not fit the devices, or nothing found does.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from exitax.checkpoint import write_bytes_atomic
from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.commands.console import CommandConsole
from exitax.errors import UserError
from exitax.parallel import format_bytes
from exitax.planning import (
  Candidate,
  Plan,
  SearchResult,
  Target,
  describe_layout,
  draw_schedules,
  find_target,
  gin_bindings,
  make_plan,
  rank_layouts,
  render_compiled,
  render_larger,
  render_plan,
  render_search,
  search,
  smallest_slice,
  to_png,
)
from exitax.training import RunConfig

PLAN_FILE, PICTURE_FILE, LAYOUT_FILE = 'plan.json', 'schedule.png', 'layout.gin'
DOES_NOT_FIT = 1
# A run needs these; a plan reads neither data nor a directory.
_UNREAD = {'MODEL_DIR': 'unused', 'MIXTURE_OR_TASK_NAME': 'unused', 'TRAIN_STEPS': 100_000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  parser.add_argument(
    '--topology', metavar='SLICE', help='TPU slice, such as v5e:4x4, v5p:2x2x4 or v6e-16'
  )
  parser.add_argument('--chip', metavar='NAME', help="data sheet to plan by, such as 'TPU v5e'")
  parser.add_argument(
    '--search', action='store_true', help='try meshes, schedules, microbatches, recomputation'
  )
  parser.add_argument(
    '--num_compiled',
    type=int,
    default=3,
    metavar='N',
    help='with --search, how many of the best to compile (default 3)',
  )
  parser.add_argument(
    '--estimate_only', action='store_true', help='arithmetic only, without compiling: seconds'
  )
  parser.add_argument(
    '--output_dir', metavar='DIR', help=f'write {PLAN_FILE}, {PICTURE_FILE}, {LAYOUT_FILE} here'
  )
  flag_groups.add_gin_flags(parser)
  flag_groups.add_device_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Plans."""
  if not flags.gin_file:
    raise UserError('plan needs a model: --gin_file=gin/models/ee_1p3b.gin')
  if flags.num_compiled < 0:
    raise UserError(f'--num_compiled={flags.num_compiled} must be 0 or more')
  if flags.topology and flags.emulate_devices:
    raise UserError('--topology and --emulate_devices both say which devices: give one')
  if flags.topology and flags.chip:
    raise UserError('--topology and --chip both say which chip: give one')
  if flags.output_dir:
    flag_groups.make_folder(flags.output_dir, name='--output_dir')
  flag_groups.start_jax(flags)
  target = find_target(flags.topology, flags.chip)
  flag_groups.parse_gin(
    flags, text="include 'runs/pretrain.gin'", bind_model_dir=False, if_required=_UNREAD
  )
  run_config = gin_config.build(RunConfig)
  console = CommandConsole()
  if flags.search:
    return _search(run_config, target, flags, console)
  return _plan(run_config, target, flags, console)


def _plan(
  run_config: RunConfig, target: Target, flags: argparse.Namespace, console: Console
) -> int:
  with console.status(f'compiling for {target.name}'):
    plan = make_plan(run_config, target, compile=not flags.estimate_only)
    remedies, larger = (), None
    if not plan.fits and target.chip is not None:
      # The fastest layouts that fit by estimate, or the smallest.
      ranking = rank_layouts(run_config, target)
      remedies = ranking.ranked[:3]
      larger = None if ranking.fits else smallest_slice(run_config, target)
  console.print(render_plan(plan, remedies, larger))
  _write(plan, flags.output_dir, console)
  return 0 if plan.fits else DOES_NOT_FIT


def _search(
  run_config: RunConfig, target: Target, flags: argparse.Namespace, console: Console
) -> int:
  count = 0 if flags.estimate_only else flags.num_compiled
  with console.status('estimating every layout') as status:

    def on_compile(number: int, candidate: Candidate) -> None:
      status.update(f'compiling {number + 1} of {count}: {describe_layout(candidate.run)}')

    result = search(
      run_config,
      target,
      num_compiled=count,
      on_ranked=lambda ranking: console.print(render_search(ranking)),
      on_compile=on_compile,
      on_compiled=lambda number, plan: console.print(render_compiled(number, plan)),
    )
    best = result.best if count else _by_estimate(result, target)
    larger = None if result.fits else smallest_slice(run_config, target)
  if best is None:
    smallest = result.ranked[0].estimate.memory.total
    reason = (
      'none of those compiled fits: compile more with --num_compiled'
      if result.fits
      else f'nothing fits by estimate: {format_bytes(smallest - result.limit)} more than the '
      f'{format_bytes(result.limit)} there are, at least: {render_larger(larger)}'
    )
    console.print(reason, style='red')
    return DOES_NOT_FIT
  console.print(f'\nbest: {describe_layout(best.run)}\n\n{gin_bindings(best.run)}')
  _write(best, flags.output_dir, console)
  return 0


def _by_estimate(result: SearchResult, target: Target) -> Plan | None:
  """The first of the ranking, if it fits."""
  return make_plan(result.ranked[0].run, target, compile=False) if result.fits else None


def _write(plan: Plan, directory: str | None, console: Console) -> None:
  if not directory:
    return
  folder = Path(directory)
  written = [PLAN_FILE, LAYOUT_FILE]
  text = json.dumps(plan.to_dict(), indent=2, default=str)
  write_bytes_atomic(folder / PLAN_FILE, (text + '\n').encode())
  write_bytes_atomic(folder / LAYOUT_FILE, gin_bindings(plan.run).encode())
  if plan.schedule:
    picture = draw_schedules([plan.schedule], max_ticks=30)
    write_bytes_atomic(folder / PICTURE_FILE, to_png(picture))
    written.append(PICTURE_FILE)
  else:
    (folder / PICTURE_FILE).unlink(missing_ok=True)  # Of an earlier plan, with stages.
  console.print(f'written to {folder}: {", ".join(written)}')
