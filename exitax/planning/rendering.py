"""Plans and searches for a terminal: tables, and the schedule as a coloured timeline."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from exitax.parallel import Chip, Schedule, Topology, WorkKind, format_bytes
from exitax.planning.plan import COMFORTABLE, Plan
from exitax.planning.search import Candidate, SearchResult, describe_layout

_FORWARD, _BACKWARD, _IDLE = 'blue', 'green', 'bright_black'


def render_plan(
  plan: Plan,
  remedies: tuple[Candidate, ...] = (),
  larger: tuple[Topology, Candidate] | None = None,
) -> RenderableType:
  """Everything that a plan says.

  Args:
    plan: the plan.
    remedies: where it does not fit, other layouts, the best first.
    larger: where none of them fits either, a slice that would do.
  """
  verdict = _verdict(plan, remedies, larger)
  parts: list[RenderableType] = [_heading(plan), _memory_table(plan), verdict]
  parts.append(_time_table(plan))
  if plan.compiled and plan.compiled.collectives:
    parts.append(_collectives_table(plan))
  if plan.schedule:
    parts.append(render_timeline(plan.schedule))
  return Group(*(item for part in parts for item in (part, Text())))


def render_search(result: SearchResult, *, num_shown: int = 10) -> RenderableType:
  """The ranking, by estimate."""
  order = 'fastest that fit first'
  if not result.is_comfortable:
    order = f'none within {COMFORTABLE:.0%} of {format_bytes(result.limit)}, smallest first'
  table = Table(title=f'{result.num_tried:,} layouts tried, {order}', box=None)
  for name in ('', 'step', 'MFU', 'bubble', 'memory'):
    table.add_column(name, justify='right')
  table.add_column('layout')  # Last: it is long, and may be broken on narrow terminals.
  for number, candidate in enumerate(result.ranked[:num_shown], start=1):
    estimate = candidate.estimate
    assert estimate.time is not None
    table.add_row(
      f'{number}.',
      _seconds(estimate.time.step),
      f'{estimate.mfu:.0%}',
      f'{estimate.bubble:.1%}',
      format_bytes(estimate.memory.total),
      describe_layout(candidate.run),
    )
  return table


def render_compiled(number: int, plan: Plan) -> Text:
  """What the compiler found of the layout at a place (from 0) of the ranking."""
  estimated = format_bytes(plan.estimate.memory.total)
  text = Text(f'{number + 1}. compiled: ')
  text.append_text(_compiled_memory(plan))
  text.append(f' (estimated {estimated})')
  return text


def render_larger(larger: tuple[Topology, Candidate] | None) -> str:
  """Which slice would do, and how."""
  if larger is None:
    return 'take a larger slice'
  topology, candidate = larger
  return f'take {topology}, {_layout_and_memory(candidate)}'


def render_timeline(schedule: Schedule, *, width: int = 96) -> Text:
  """As many ticks of the table as fit, a line per stage; forwards blue, backwards green."""
  columns: list[list[Text]] = []
  used = 0
  for tick in range(schedule.num_ticks):
    cells = [_tick(schedule, tick, stage) for stage in range(schedule.num_stages)]
    size = max(map(len, cells)) + 1
    if used + size > width:
      break
    for cell in cells:
      cell.pad_right(size - len(cell))
    columns.append(cells)
    used += size
  text = Text(f"{schedule.kind.value}: f forward, b backward, ' next chunk, . idle", style='italic')
  if len(columns) < schedule.num_ticks:
    text.append(f' (the first {len(columns)} of {schedule.num_ticks} ticks)')
  digits = len(str(schedule.num_stages - 1))
  for stage in range(schedule.num_stages):
    text.append(f'\nstage {stage:<{digits}}  ', style='not italic')
    for cells in columns:
      text.append_text(cells[stage])
  return text


def _heading(plan: Plan) -> Text:
  run, target = plan.run, plan.target
  exits = ', '.join(str(item.layer) for item in run.model.exits) or 'none'
  devices = _counted(len(target.devices), 'device')
  rows = _counted(run.data.batch_size, 'row')
  lines = [
    f'{run.model.num_layers} layers of {run.model.embed_dim}, exits after layers: {exits}',
    f'{target.name}: {devices}, {describe_layout(run)}',
    f'{rows} of {run.data.length} tokens a step',
  ]
  if plan.compiled:
    lines.append(f'compiled for {target.platform} in {plan.compiled.seconds:.0f} s')
  text = Text('\n'.join(lines))
  if target.note:
    text.append(f'\n{target.note}', style='yellow')
  return text


def _memory_table(plan: Plan) -> Table:
  table = Table(title='memory of a device', box=None)
  table.add_column('')
  table.add_column('estimated', justify='right')
  memory = plan.estimate.memory
  compiled = plan.compiled.memory if plan.compiled else None
  if plan.compiled:
    table.add_column('compiled', justify='right')
  activations = memory.kept + memory.working
  temporary = memory.weights + memory.gradients + activations
  rows = [
    ('parameters', memory.parameters, None),
    ('optimizer', memory.optimizer, None),
    ('  together, with the batch', None, compiled and compiled.arguments + compiled.results),
    ('parameters in the compute dtype', memory.weights, None),
    ('gradients', memory.gradients, None),
    ('activations kept for the backward', memory.kept, None),
    ('activations of one backward', memory.working, None),
    ('  temporary, all four', temporary, compiled and compiled.temporary),
    ('program', None, compiled and compiled.code),
  ]
  for name, estimated, found in rows:
    cells = [name, '' if estimated is None else format_bytes(estimated)]
    if plan.compiled:
      cells.append('' if found is None else format_bytes(found))
    table.add_row(*cells)
  total = [Text('total', style='bold'), format_bytes(memory.total)]
  if plan.compiled:
    total.append(format_bytes(plan.memory_bytes) if plan.memory_bytes is not None else 'too much')
  table.add_row(*total)
  return table


def _verdict(
  plan: Plan, remedies: tuple[Candidate, ...], larger: tuple[Topology, Candidate] | None
) -> Text:
  limit = plan.memory_limit
  if limit is None:
    return Text('no data sheet of this device: name one with --chip to compare with')
  if plan.fits:
    share = plan.share or 0.0
    text = Text(f'fits: {share:.0%} of {format_bytes(limit)}', style='bold green')
    remat = plan.compiled.num_rematerialised if plan.compiled else 0
    if remat:
      text.append(f'\nthe compiler computes {remat} instructions twice to fit', style='yellow')
    elif share > COMFORTABLE:
      text.append(
        f'\nabove {COMFORTABLE:.0%} the compiler may compute things twice to fit', style='yellow'
      )
    return text
  text = Text(
    f'does not fit: {format_bytes(plan.missing_bytes)} more than the {format_bytes(limit)} there are',
    style='bold red',
  )
  fitting = [c for c in remedies if c.estimate.memory.total <= limit]
  if not fitting:
    text.append(f'\nnothing fits by estimate: {render_larger(larger)}', style='red')
    for least in remedies[:1]:
      text.append(f'\nthe smallest: {_layout_and_memory(least)}')
    return text
  text.append('\nwould fit by estimate:')
  for candidate in fitting:
    time = candidate.estimate.time
    text.append(
      f'\n  {_layout_and_memory(candidate)}' + (f', {_seconds(time.step)} a step' if time else '')
    )
  return text


def _layout_and_memory(candidate: Candidate) -> str:
  return f'{describe_layout(candidate.run)}: {format_bytes(candidate.estimate.memory.total)}'


def _time_table(plan: Plan) -> Table:
  estimate, num_devices = plan.estimate, len(plan.target.devices)
  table = Table(title='a step, by roofline', box=None, show_header=False)
  table.add_column('')
  table.add_column('', justify='right')
  executed = estimate.executed_flops * num_devices
  if plan.compiled and not plan.compiled.flops.num_open_loops:
    executed = float(plan.compiled.flops.flops)
  table.add_row('flops of the model', _count(estimate.model_flops))
  table.add_row('flops executed, all devices', _count(executed))
  table.add_row('pipeline bubble', f'{estimate.bubble:.1%}')
  if estimate.time:
    time = estimate.time
    table.add_row('arithmetic at peak', _seconds(time.arithmetic))
    table.add_row('memory traffic', _seconds(time.traffic))
    for axis, seconds in time.links.items():
      table.add_row(f'collectives over {axis}', _seconds(seconds))
    table.add_row(Text('step, at least', style='bold'), _seconds(time.step))
    table.add_row(Text('MFU, at most', style='bold'), f'{estimate.mfu:.0%}')
  return table


def _collectives_table(plan: Plan) -> Table:
  assert plan.compiled is not None
  table = Table(title='collectives of a device in a step, as compiled', box=None)
  table.add_column('kind')
  table.add_column('over')
  for name in ('count', 'sent', 'time'):
    table.add_column(name, justify='right')
  chip = plan.target.chip
  for item in plan.compiled.collectives:
    table.add_row(
      item.kind,
      ' x '.join(item.axes) or '-',
      f'{item.count:,}',
      format_bytes(item.bytes_sent),
      _seconds(item.bytes_sent / _bandwidth(item.kind, chip)) if chip else '',
    )
  return table


def _compiled_memory(plan: Plan) -> Text:
  if not plan.fits or plan.memory_bytes is None:
    return Text('does not fit', style='red')
  remat = plan.compiled.num_rematerialised if plan.compiled else 0
  mark = f' ({remat} computed twice)' if remat else ''
  return Text(f'{format_bytes(plan.memory_bytes)}{mark}', style='yellow' if mark else 'green')


def _tick(schedule: Schedule, tick: int, stage: int) -> Text:
  text = Text(style='not italic')
  for item in schedule.work_at(tick, stage):
    text.append(str(item), style=_BACKWARD if item.kind is WorkKind.BACKWARD else _FORWARD)
  if not text:
    text.append('.', style=_IDLE)
  return text


def _bandwidth(kind: str, chip: Chip) -> float:
  return chip.neighbour_bandwidth if kind == 'collective-permute' else chip.ring_bandwidth


def _seconds(seconds: float) -> str:
  return f'{seconds:.2f} s' if seconds >= 1 else f'{seconds * 1e3:.1f} ms'


def _count(flops: float) -> str:
  for unit in ('', 'K', 'M', 'G', 'T', 'P'):
    if flops < 1000:
      return f'{flops:.3g} {unit}'
    flops /= 1000
  return f'{flops:.3g} E'


def _counted(number: int, noun: str) -> str:
  return f'{number} {noun}' + ('' if number == 1 else 's')
