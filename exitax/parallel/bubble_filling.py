"""Partial microbatches in the bubble of 1F1B: EE-LLM, arXiv 2312.04916, section 3.2 and appendix.

Until the first gradients come back, the backward slots of the early stages are idle. They take extra
microbatches that run through the first few stages only, forward and backward, for the losses of the
exits there. A backward slot holds one backward, or as many forwards as last as long:

  P = 4, r = 2, M = 5, extras 5 and 6 on stage 0 (F a forward in a backward slot)

  stage 0  f0 f1 f2 f3F5F6 f4b5   b6   b0 ...
  stage 1  .  f0 f1 f2     f3     f4b0 ...

With a backward r times as long as a forward at most (P - 1) r / (1 + r) extras fit. The step takes
no longer; how a loss over different numbers of microbatches stays unbiased is the objective's affair.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from exitax.errors import UserError
from exitax.parallel.schedule import IDLE, Schedule, ScheduleKind, WorkTable, assign_slots


@dataclasses.dataclass(frozen=True)
class _Placed:
  """One extra microbatch: its depth in stages, and where its forwards and backwards are."""

  depth: int
  lane: int  # Of the forwards of a slot, which.
  first_forward: int  # Tick on stage 0; one tick later on each further stage.
  first_backward: int  # Tick on stage `depth - 1`; one later on each earlier stage.


def max_extras(num_stages: int, backward_over_forward: float) -> int:
  """Most extras that fit the bubble, (P - 1) r / (1 + r) rounded down."""
  ratio = backward_over_forward
  return math.floor((num_stages - 1) * ratio / (1 + ratio) + 1e-9)


def fill_bubbles(
  schedule: Schedule, *, backward_over_forward: float, min_depth: int = 1
) -> Schedule:
  """The table of 1F1B with extra microbatches, numbered after all others.

  Args:
    schedule: 1F1B.
    backward_over_forward: r, how much longer a backward lasts than a forward; at least 1.
    min_depth: stages that an extra must run through to be of use: up to the first exit.

  Raises:
    UserError: another schedule, or a ratio below 1.
  """
  if schedule.kind is not ScheduleKind.ONE_F_ONE_B:
    raise UserError(f"bubbles of {schedule.kind.value!r} are not filled: choose schedule '1f1b'")
  if not backward_over_forward >= 1:
    raise UserError(
      f'backward over forward time of {backward_over_forward} is below 1: a forward does not fit '
      'the place of a backward; recomputing less makes it no longer, choose 1 or more'
    )
  lanes = math.floor(backward_over_forward + 1e-9)
  placed = _place(
    schedule, lanes, max_extras(schedule.num_stages, backward_over_forward), min_depth
  )
  return _with_extras(schedule, placed, lanes)


def _place(schedule: Schedule, lanes: int, limit: int, min_depth: int) -> list[_Placed]:
  """Extras one by one: as deep as there is room, then as early."""
  num_stages = schedule.num_stages
  first = num_stages - 1  # Tick of the first backward of all.
  # Idle backward slots before a stage's own backwards begin.
  idle = {
    (tick, stage)
    for stage in range(num_stages)
    for tick in range(first, min(2 * first - stage, schedule.num_ticks))
    if not schedule.backward.busy[: tick + 1, stage].any()
  }
  forwards: set[tuple[int, int, int]] = set()
  backwards: set[tuple[int, int]] = set()
  placed: list[_Placed] = []

  def has_room(item: _Placed) -> bool:
    for stage in range(item.depth):
      at = (item.first_forward + stage, stage)
      if at not in idle or at in backwards or (*at, item.lane) in forwards:
        return False
      back = (item.first_backward + item.depth - 1 - stage, stage)
      if back not in idle or back in backwards or any((*back, n) in forwards for n in range(lanes)):
        return False
    return True

  def candidates() -> list[_Placed]:
    ticks = range(first, 2 * first)
    return [
      _Placed(depth, lane, start, back)
      for depth in range(num_stages - 1, min_depth - 1, -1)
      for start in ticks
      for lane in range(lanes)
      for back in range(start + depth, 2 * first)
    ]

  for item in candidates() * limit:
    if len(placed) < limit and has_room(item):
      placed.append(item)
      for stage in range(item.depth):
        forwards.add((item.first_forward + stage, stage, item.lane))
        backwards.add((item.first_backward + item.depth - 1 - stage, stage))
  return placed


def _with_extras(schedule: Schedule, placed: list[_Placed], lanes: int) -> Schedule:
  num_ticks, num_stages = schedule.forward.microbatch.shape
  if not placed:
    return schedule
  backward = WorkTable(*(array.copy() for array in dataclasses.astuple(schedule.backward)))
  forward = WorkTable(*(array.copy() for array in dataclasses.astuple(schedule.forward)))
  late = WorkTable(
    microbatch=np.full((num_ticks, num_stages, lanes), IDLE, np.int32),
    chunk=np.zeros((num_ticks, num_stages, lanes), np.int32),
    slot=np.zeros((num_ticks, num_stages, lanes), np.int32),
  )
  begins = np.zeros((num_ticks, num_stages), bool)
  for number, item in enumerate(placed, start=schedule.num_microbatches):
    begins[item.first_backward, item.depth - 1] = True
    for stage in range(item.depth):
      late.microbatch[item.first_forward + stage, stage, item.lane] = number
      backward.microbatch[item.first_backward + item.depth - 1 - stage, stage] = number
  num_slots = assign_slots(forward, backward, late)
  return dataclasses.replace(
    schedule,
    forward=forward,
    backward=backward,
    num_slots=num_slots,
    late=late,
    begins=begins,
    extra_depths=tuple(item.depth for item in placed),
  )
