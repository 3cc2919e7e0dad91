"""Pictures of schedules: who works on what, when, and where nobody does."""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from exitax.parallel import Schedule, WorkItem, WorkKind

DPI = 130
# Okabe and Ito's blue and green, lighter for later chunks.
_FORWARD = ('#0072B2', '#56B4E9', '#9ad1f2', '#cfe8f8')
_BACKWARD = ('#009E73', '#5cc4a6', '#a3dfcd', '#d6f2ea')
_LATE = ('#D55E00',)  # Partial microbatches, in the bubble.
_MAX_LABELLED = 700  # Pieces of work; beyond, numbers would be smaller than a pixel.


def draw_schedules(
  schedules: Sequence[Schedule], *, backward_over_forward: float = 2.0, max_ticks: int | None = None
) -> Figure:
  """A timeline per schedule, one below the other, on the same scale of time."""
  figure = Figure(figsize=(13, 0.7 + sum(0.9 + 0.36 * s.num_stages for s in schedules)), dpi=DPI)
  figure.set_layout_engine('constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(len(schedules), 1, squeeze=False, sharex=True)[:, 0]
  longest = 0.0
  for ax, schedule in zip(axes, schedules, strict=True):
    draw_schedule(ax, schedule, backward_over_forward=backward_over_forward, max_ticks=max_ticks)
    longest = max(longest, ax.get_xlim()[1])
  # Time is shared, so each timeline has set its own end for all of them.
  axes[-1].set_xlim(0, longest)
  axes[-1].set_xlabel("time, in forwards of a stage's layers")
  return figure


def draw_schedule(
  ax: Axes,
  schedule: Schedule,
  *,
  backward_over_forward: float = 2.0,
  max_ticks: int | None = None,
) -> None:
  """Draws the table into `ax`; every tick lasts as long as its dearest work.

  Args:
    ax: where.
    schedule: the table.
    backward_over_forward: length of a backward, in forwards.
    max_ticks: draws the first ticks only.
  """
  num_ticks = min(schedule.num_ticks, max_ticks or schedule.num_ticks)
  is_labelled = num_ticks * schedule.num_stages <= _MAX_LABELLED
  # Chunks of an interleaved stage are as many times shorter.
  unit = 1.0 / schedule.num_chunks
  now = 0.0
  for tick in range(num_ticks):
    work = [schedule.work_at(tick, stage) for stage in range(schedule.num_stages)]
    kinds = {item.kind for items in work for item in items}
    middle = now + (unit if WorkKind.FORWARD in kinds else 0.0)
    for stage, items in enumerate(work):
      late = middle  # Forwards in the place of a backward follow each other.
      for item in items:
        match item.kind:
          case WorkKind.FORWARD:
            _draw_work(ax, item, stage, now, unit, _FORWARD, is_labelled)
          case WorkKind.LATE:
            _draw_work(ax, item, stage, late, unit, _LATE, is_labelled)
            late += unit
          case WorkKind.BACKWARD:
            length = unit * backward_over_forward
            _draw_work(ax, item, stage, middle, length, _BACKWARD, is_labelled)
    is_long = kinds & {WorkKind.LATE, WorkKind.BACKWARD}
    now = middle + (unit * backward_over_forward if is_long else 0.0)
  bubble = schedule.bubble_fraction(backward_over_forward=backward_over_forward)
  cut = (
    '' if num_ticks == schedule.num_ticks else f', first {num_ticks} of {schedule.num_ticks} ticks'
  )
  ax.set_title(
    f'{schedule.kind.value}: {schedule.num_microbatches} microbatches, bubble {bubble:.1%}, '
    f'{max(schedule.num_slots_of(s) for s in range(schedule.num_stages))} in flight{cut}',
    loc='left',
    fontsize=11,
  )
  ax.set_xlim(0, now)
  ax.set_ylim(schedule.num_stages - 0.5, -0.5)
  ax.set_yticks(range(schedule.num_stages), [f'stage {s}' for s in range(schedule.num_stages)])
  ax.set_facecolor('#f2f2f2')
  ax.spines[['top', 'right']].set_visible(False)


def to_png(figure: Figure) -> bytes:
  """The figure as the content of a PNG file."""
  out = io.BytesIO()
  figure.savefig(out, format='png', dpi=DPI)
  return out.getvalue()


def _draw_work(
  ax: Axes,
  item: WorkItem,
  stage: int,
  start: float,
  length: float,
  colours: Sequence[str],
  is_labelled: bool,
) -> None:
  colour = colours[min(item.chunk, len(colours) - 1)]
  ax.add_patch(
    Rectangle((start, stage - 0.42), length, 0.84, facecolor=colour, edgecolor='white', lw=0.6)
  )
  if is_labelled:
    ink = 'white' if item.chunk == 0 else '#222222'
    at = start + length / 2
    ax.text(at, stage, str(item.microbatch), ha='center', va='center', color=ink, fontsize=7)
