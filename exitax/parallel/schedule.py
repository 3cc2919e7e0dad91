"""Pipeline schedules as tables: what every stage works on, tick by tick.

A tick is one forward followed by one backward of a chunk of layers on every stage in lock step;
either may be missing. Between ticks activations go to the next stage and gradients to the one
before. Three kinds, two stages and three microbatches (`f` forward, `b` backward, `.` idle):

  gpipe         stage 0  f0 f1 f2 .  .  b0 b1 b2      all forwards, then all backwards
                stage 1  .  f0 f1 f2 b0 b1 b2 .
  1f1b          stage 0  f0 f1   f2b0 b1   b2         backwards start as soon as they can
                stage 1  .  f0b0 f1b1 f2b2 .
  interleaved   1f1b in which a stage holds several chunks of layers, `stage, stage + stages, ...`

The tables say nothing of how ticks are executed: `pipeline.py` runs any of them.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import itertools

import numpy as np

from exitax.errors import UserError, choose

IDLE = -1


class ScheduleKind(enum.Enum):
  """Order of forwards and backwards."""

  GPIPE = 'gpipe'  # arXiv 1811.06965: the bubble of 1F1B, every microbatch in flight.
  ONE_F_ONE_B = '1f1b'  # PipeDream-Flush, arXiv 2006.09503: few microbatches in flight.
  INTERLEAVED = 'interleaved'  # arXiv 2104.04473: chunks in turn, a smaller bubble.


@dataclasses.dataclass(frozen=True, eq=False)
class WorkTable:
  """One kind of work (forward or backward), by tick and stage.

  Attributes:
    microbatch: i32 `[ticks, stages]`, `IDLE` where there is none.
    chunk: i32 `[ticks, stages]`, which of the stage's chunks; 0 where idle.
    slot: i32 `[ticks, stages]`, where the stage keeps what the backward needs from the forward;
      where idle, the spare slot after all others.
  """

  microbatch: np.ndarray
  chunk: np.ndarray
  slot: np.ndarray

  @property
  def busy(self) -> np.ndarray:
    """Bool `[ticks, stages]`."""
    return self.microbatch != IDLE


class WorkKind(enum.Enum):
  """What a stage does with a chunk; the value is its letter in tables."""

  FORWARD = 'f'
  LATE = 'F'  # A forward in the place of a backward.
  BACKWARD = 'b'


@dataclasses.dataclass(frozen=True)
class WorkItem:
  """One piece of work, as text `f3` or, of the second chunk, `f3'`."""

  kind: WorkKind
  microbatch: int
  chunk: int

  def __str__(self) -> str:
    return f'{self.kind.value}{self.microbatch}{chr(39) * self.chunk}'


@dataclasses.dataclass(frozen=True)
class Phase:
  """Consecutive ticks of the same make: one loop of the executor.

  Attributes:
    start: first tick.
    stop: after the last one.
    has_forward: some stage has a forward.
    has_backward: some stage has a backward.
    has_late: some stage has a forward in the place of a backward.
  """

  start: int
  stop: int
  has_forward: bool
  has_backward: bool
  has_late: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
  """A table of forwards and backwards.

  Layers are cut into `num_stages * num_chunks` spans; span `chunk * num_stages + stage` is the
  stage's chunk of that number, so spans follow each other around the ring of stages.

  Attributes:
    kind: how it was made.
    num_stages: stages P.
    num_microbatches: microbatches M.
    num_chunks: chunks per stage v.
    forward: the forwards.
    backward: the backwards; all idle in a schedule for evaluation.
    num_slots: slots per stage, the largest number of chunks in flight on one.
    late: forwards of extra microbatches in the place of a backward, `[ticks, stages, lanes]`; None
      unless bubbles are filled (`bubble_filling.py`).
    begins: bool `[ticks, stages]`, where an extra's backward begins: no gradient comes from the
      next stage. None as `late`.
    extra_depths: of every extra microbatch, the stages that it runs through.
  """

  kind: ScheduleKind
  num_stages: int
  num_microbatches: int
  num_chunks: int
  forward: WorkTable
  backward: WorkTable
  num_slots: int
  late: WorkTable | None = None
  begins: np.ndarray | None = None
  extra_depths: tuple[int, ...] = ()

  @property
  def num_parts(self) -> int:
    """Microbatches of the data, those that run through a few stages only included."""
    return self.num_microbatches + len(self.extra_depths)

  @property
  def num_ticks(self) -> int:
    """Rows of the tables."""
    return len(self.forward.microbatch)

  @property
  def phases(self) -> tuple[Phase, ...]:
    """The table cut where ticks change their make."""
    late = np.zeros(self.num_ticks, bool)
    if self.late is not None:
      late |= self.late.busy.any(axis=(1, 2))
    make = [
      (bool(f.any()), bool(b.any() or is_late), bool(is_late))
      for f, b, is_late in zip(self.forward.busy, self.backward.busy, late, strict=True)
    ]
    phases, start = [], 0
    for (has_forward, has_backward, has_late), ticks in itertools.groupby(make):
      stop = start + len(list(ticks))
      phases.append(Phase(start, stop, has_forward, has_backward, has_late))
      start = stop
    return tuple(phases)

  def work_at(self, tick: int, stage: int) -> tuple[WorkItem, ...]:
    """What a stage does in a tick, in order; empty where it is idle."""
    places = [(WorkKind.FORWARD, self.forward, (tick, stage))]
    if self.late is not None:
      lanes = range(self.late.microbatch.shape[2])
      places += [(WorkKind.LATE, self.late, (tick, stage, lane)) for lane in lanes]
    places.append((WorkKind.BACKWARD, self.backward, (tick, stage)))
    return tuple(
      WorkItem(kind, int(table.microbatch[place]), int(table.chunk[place]))
      for kind, table, place in places
      if table.busy[place]
    )

  def num_slots_of(self, stage: int) -> int:
    """Chunks that are in flight on one stage at once, at most."""
    forwards = self.forward.busy[:, stage].cumsum()
    if self.late is not None:
      forwards = forwards + self.late.busy[:, stage].sum(axis=1).cumsum()
    backwards = np.concatenate([[0], self.backward.busy[:-1, stage].cumsum()])
    return int((forwards - backwards).max())

  def time(self, *, backward_over_forward: float = 2.0) -> float:
    """Length in forwards of one chunk: each tick lasts as long as its dearest work."""
    ticks = self.forward.busy.any(axis=1).sum()
    return float(ticks + self.backward.busy.any(axis=1).sum() * backward_over_forward)

  def bubble_fraction(self, *, backward_over_forward: float = 2.0) -> float:
    """Share of the time in which a stage has nothing to do, mean over stages."""
    busy = self.forward.busy.sum() + self.backward.busy.sum() * backward_over_forward
    if self.late is not None:
      busy += self.late.busy.sum()
    time = self.time(backward_over_forward=backward_over_forward)
    return 1.0 - float(busy) / (self.num_stages * time)


def bubble_formula(num_stages: int, num_microbatches: int, num_chunks: int = 1) -> float:
  """Bubble of all three kinds, (P - 1) / (v M + P - 1) (arXiv 2104.04473, section 2.2)."""
  return (num_stages - 1) / (num_chunks * num_microbatches + num_stages - 1)


def make_schedule(
  kind: ScheduleKind | str, *, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> Schedule:
  """The table of a training step.

  Args:
    kind: order of forwards and backwards.
    num_stages: at least 1.
    num_microbatches: at least 1; a multiple of the stages for INTERLEAVED.
    num_chunks: 1 unless INTERLEAVED.

  Raises:
    UserError: sizes that the kind cannot have.
  """
  kind = choose(ScheduleKind, kind, name='schedule')
  _check_sizes(kind, num_stages, num_microbatches, num_chunks)
  span = num_stages * num_chunks
  # Tick of each piece of work on the stage: forwards enter stage 0 one a tick; backwards enter
  # the last stage one a tick, from `first_backward` on.
  items = num_microbatches * num_chunks
  first_backward = span - 1 if kind is not ScheduleKind.GPIPE else items + num_stages - 1
  num_ticks = first_backward + items + num_stages - 1
  forward = _empty(num_ticks, num_stages)
  backward = _empty(num_ticks, num_stages)
  for item in range(items):
    chunk, microbatch = _item(item, num_stages, num_chunks)
    for stage in range(num_stages):
      _put(forward, item + stage, stage, microbatch, chunk)
      tick = first_backward + item + num_stages - 1 - stage
      _put(backward, tick, stage, microbatch, num_chunks - 1 - chunk)
  num_slots = assign_slots(forward, backward)
  return Schedule(kind, num_stages, num_microbatches, num_chunks, forward, backward, num_slots)


def forward_schedule(*, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
  """The table of an evaluation: forwards only, nothing kept."""
  kind = ScheduleKind.GPIPE if num_chunks == 1 else ScheduleKind.INTERLEAVED
  _check_sizes(kind, num_stages, num_microbatches, num_chunks)
  items = num_microbatches * num_chunks
  num_ticks = items + num_stages - 1
  forward = _empty(num_ticks, num_stages)
  for item in range(items):
    chunk, microbatch = _item(item, num_stages, num_chunks)
    for stage in range(num_stages):
      _put(forward, item + stage, stage, microbatch, chunk)
  return Schedule(
    kind, num_stages, num_microbatches, num_chunks, forward, _empty(num_ticks, num_stages), 0
  )


def render_schedule(schedule: Schedule) -> str:
  """The table as text, a line per stage; chunks after the first as `f3'` and `f3''`.

  `F` is a forward in the place of a backward.
  """
  ticks = range(schedule.num_ticks)
  cells = [
    [''.join(map(str, schedule.work_at(tick, stage))) or '.' for tick in ticks]
    for stage in range(schedule.num_stages)
  ]
  widths = [max(len(row[tick]) for row in cells) for tick in ticks]
  lines = [
    f'stage {stage}  ' + ' '.join(text.ljust(w) for text, w in zip(row, widths, strict=True))
    for stage, row in enumerate(cells)
  ]
  return '\n'.join(line.rstrip() for line in lines)


def _item(item: int, num_stages: int, num_chunks: int) -> tuple[int, int]:
  """Chunk and microbatch of the n-th forward: P microbatches go round all chunks, then the next P.

  With one chunk that is every microbatch in order. Backwards take the chunks in reverse.
  """
  if num_chunks == 1:
    return 0, item
  group, within = divmod(item, num_stages * num_chunks)
  chunk, place = divmod(within, num_stages)
  return chunk, group * num_stages + place


def _check_sizes(
  kind: ScheduleKind, num_stages: int, num_microbatches: int, num_chunks: int
) -> None:
  sizes = {
    'num_stages': num_stages,
    'num_microbatches': num_microbatches,
    'num_chunks': num_chunks,
  }
  for name, size in sizes.items():
    if size < 1:
      raise UserError(f'{name}={size} must be at least 1')
  if kind is not ScheduleKind.INTERLEAVED and num_chunks > 1:
    raise UserError(
      f"num_chunks={num_chunks} needs schedule 'interleaved': {kind.value!r} has one chunk a stage"
    )
  if num_chunks > 1 and num_microbatches % num_stages:
    below = num_microbatches // num_stages * num_stages
    choices = ' or '.join(str(n) for n in (below, below + num_stages) if n)
    raise UserError(
      f'num_microbatches={num_microbatches} is not a multiple of the {num_stages} stages, as '
      f'interleaving needs: choose {choices}'
    )


def _empty(num_ticks: int, num_stages: int) -> WorkTable:
  shape = (num_ticks, num_stages)
  return WorkTable(
    microbatch=np.full(shape, IDLE, np.int32),
    chunk=np.zeros(shape, np.int32),
    slot=np.zeros(shape, np.int32),
  )


def _put(table: WorkTable, tick: int, stage: int, microbatch: int, chunk: int) -> None:
  table.microbatch[tick, stage] = microbatch
  table.chunk[tick, stage] = chunk


def assign_slots(forward: WorkTable, backward: WorkTable, late: WorkTable | None = None) -> int:
  """Gives every piece of work in flight a slot of its own; returns how many a stage needs."""
  num_ticks, num_stages = forward.microbatch.shape
  used = 0
  for stage in range(num_stages):
    free: list[int] = []
    held: dict[tuple[int, int], int] = {}
    allocated = 0
    for tick in range(num_ticks):
      begun = [(forward, (tick, stage))]
      if late is not None:
        begun += [(late, (tick, stage, lane)) for lane in range(late.microbatch.shape[2])]
      for table, place in begun:
        if not table.busy[place]:
          continue
        if not free:
          free.append(allocated)
          allocated += 1
        slot = heapq.heappop(free)
        held[_key(table, place)] = table.slot[place] = slot
      if backward.busy[tick, stage]:
        slot = held.pop(_key(backward, (tick, stage)))
        backward.slot[tick, stage] = slot
        heapq.heappush(free, slot)
    used = max(used, allocated)
  for table in (forward, backward, *([] if late is None else [late])):
    table.slot[~table.busy] = used
  return used


def _key(table: WorkTable, place: tuple[int, ...]) -> tuple[int, int]:
  return int(table.microbatch[place]), int(table.chunk[place])
