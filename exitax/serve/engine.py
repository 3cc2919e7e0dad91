"""Continuous batching: requests join and leave the running batch between steps.

One thread owns all arrays and does turn after turn: drop what nobody wants, take prompts in, run
a few steps, hand out what rows have gained. Everything else talks to it through `submit` and tickets.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from exitax.decode import Gains, StepPlan, StopReason
from exitax.serve.admission import WaitingRoom, refuse_all
from exitax.serve.batch import UNREAD, WINDOWS, Prefill, SlotBatch
from exitax.serve.jobs import Deliver, Gain, Job, Ticket
from exitax.serve.metrics import Metrics, Occupancy
from exitax.serve.refusals import Refusal, unavailable
from exitax.serve.slots import Row, Slot, tokens_of

_log = logging.getLogger(__name__)

# Steps between two looks at the outside: as many as fit in this time, MAX_STEPS at most.
TURN_SECONDS = 0.05
MAX_STEPS = 8
# Windows of prompt tokens that running rows wait for, at most, in a turn.
MAX_WINDOWS = 4


class Engine:
  """Runs jobs on the slots of a batch."""

  def __init__(
    self,
    batch: SlotBatch,
    *,
    plans: dict[str, StepPlan],
    room: WaitingRoom,
    metrics: Metrics,
    request_timeout: float,
    ambient: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """Takes its parts; `start` begins to work.

    Args:
      batch: the arrays.
      plans: strategies by name.
      room: the queue.
      metrics: what is counted.
      request_timeout: seconds from arrival to the last token.
      ambient: entered by the engine's thread (the mesh).
      clock: seconds.
    """
    self._batch, self._plans, self._room, self._metrics = batch, plans, room, metrics
    self._request_timeout, self._ambient, self._clock = request_timeout, ambient, clock
    self._slots: list[Slot | None] = [None] * batch.num_slots
    self._held: tuple[Ticket, Prefill] | None = None
    self._step_seconds = dict.fromkeys(plans.values(), TURN_SECONDS)
    self._wake = threading.Event()
    self._refuses: Refusal | None = None
    self._stopping = self._in_turn = False
    self._thread = threading.Thread(target=self._work, name='exitax-engine', daemon=True)

  # Any thread.

  def submit(self, jobs: Sequence[Job], deliver: Deliver) -> Ticket:
    """Queues the jobs of one request.

    Args:
      jobs: prompts that fit the capacity, with strategies and thresholds that are checked.
      deliver: called by the engine's thread with each event; must not block.

    Raises:
      Refusal: 429, the queue is full; 400, it could never hold them; 503, the engine is leaving.
      ValueError: a job is longer than a row, or has more thinkers than there may be.
    """
    if any(job.length > self._batch.capacity for job in jobs):
      raise ValueError(f'a job needs more than the {self._batch.capacity} tokens of a row')
    if any(job.num_texts > self._batch.max_thinkers for job in jobs):
      raise ValueError(f'a job has more than {self._batch.max_thinkers} thinkers')
    if self._refuses:
      raise self._refuses
    ticket = Ticket(jobs, deliver, now=self._clock())
    self._room.enter(ticket, free_slots=self._slots.count(None))
    self._wake.set()
    return ticket

  def start(self) -> None:
    """Starts the thread."""
    self._thread.start()

  def drain(self) -> None:
    """Takes no more requests; those taken go on."""
    self._refuses = unavailable('the server is shutting down', code='draining')

  def stop(self) -> None:
    """Ends the thread; what was still running is refused."""
    self.drain()
    self._stopping = True
    self._wake.set()
    if self._thread.is_alive():
      self._thread.join()

  @property
  def draining(self) -> bool:
    """Whether new requests are refused."""
    return self._refuses is not None

  @property
  def idle(self) -> bool:
    """Whether there is nothing to do."""
    return not (self._in_turn or len(self._room) or self._held or any(self._slots))

  @property
  def cache_bytes(self) -> int:
    """Bytes of all slots."""
    return self._batch.cache_bytes

  def occupancy(self) -> Occupancy:
    """How full it is right now."""
    used = [slot for slot in tuple(self._slots) if slot]
    rows = {id(slot.row): slot.row for slot in used}.values()
    columns = sum(row.given + row.past for row in rows) + sum(slot.seen for slot in used)
    return Occupancy(
      slots=len(self._slots),
      slots_used=len(used),
      columns=len(self._slots) * self._batch.columns,
      columns_used=columns,
      waiting=len(self._room),
      prefix_bytes=self._batch.prefixes.num_bytes,
    )

  # The engine's thread.

  def turn(self) -> bool:
    """Does one round of work; False if there was none."""
    self._in_turn = True
    try:
      self._drop_unwanted()
      self._admit()
      runs = any(self._slots)
      if runs:
        self._run()
      return runs
    finally:
      self._in_turn = False

  def _work(self) -> None:
    with self._ambient():
      while not self._stopping:
        self._wake.clear()
        if not self._guarded_turn():
          self._wake.wait()
      self._fail(unavailable('the server is shutting down', code='draining'))

  def _guarded_turn(self) -> bool:
    """A turn, after whose failure the slots are empty again."""
    try:
      return self.turn()
    except Exception:
      _log.exception('the engine failed; what was running is refused')
    try:
      self._fail(unavailable('the engine failed and starts anew', code='engine_failed'))
      self._batch.reset()
    except Exception:
      _log.exception('the engine cannot start anew')
      self._refuses = unavailable('the engine has failed: restart it', code='engine_failed')
    return False

  def _drop_unwanted(self) -> None:
    """Ends what has expired, and frees what nobody wants."""
    now = self._clock()
    late = unavailable('no slot became free in time: try again later', code='queue_timeout')
    refuse_all(self._room.expire(now), late)
    running = {id(row.ticket): row.ticket for row in self._rows()}
    if self._held:
      running[id(self._held[0])] = self._held[0]
    limit = self._request_timeout
    expired = [t for t in running.values() if not t.cancelled and now - t.submitted > limit]
    late = unavailable(f'not finished after {limit:g} s: ask for less', code='request_timeout')
    refuse_all(expired, late)
    for ticket in expired:
      self._room.leave(ticket)
    if self._held:
      ticket, prefill = self._held
      # One sample gets the next slot; a group needs several at once, and holds up all behind it.
      waits = prefill.ready and prefill.job.num_texts > 1
      if waits and not ticket.cancelled and self._room.is_late(ticket, now):
        wanted = f'{prefill.job.num_texts} slots were not free at once in time: try again later'
        refuse_all([ticket], unavailable(wanted, code='queue_timeout'))
        self._room.leave(ticket)
      if ticket.cancelled:
        self._held = None
    for row in self._rows():
      if row.ticket.cancelled:
        self._batch.release(row.slots)
        self._free(row)
        continue
      unwanted = [
        number
        for number, slot in row.slots.items()
        if not slot.ended and not row.ticket.wants(slot.choice)
      ]
      if unwanted:
        self._batch.stop(unwanted)
        for number in unwanted:
          row.slots[number].ended = True
        self._settle(row)

  def _rows(self) -> list[Row]:
    """All rows in use."""
    return list({id(slot.row): slot.row for slot in self._slots if slot}.values())

  def _settle(self, row: Row) -> None:
    """Begins a row's answer, or frees it, once all of its texts have ended."""
    if not row.ended:
      return
    together = row.job.together
    if together is None or not row.answers:
      self._free(row)
      return
    row.answers = False
    number = min(row.slots)
    choice = row.job.first_choice + together.size
    if not row.ticket.wants(choice):
      self._free(row)
      return
    self._batch.answer(self._plans[row.job.strategy], row.job, row.number, number)
    for other in row.slots:
      self._slots[other] = None
    row.past = sum(slot.seen for slot in row.slots.values()) + len(together.answer)
    slot = Slot(row=row, choice=choice, last_gain=self._clock())
    self._slots[number] = slot
    row.slots = {number: slot}

  def _free(self, row: Row) -> None:
    for number in row.slots:
      self._slots[number] = None

  def _admit(self) -> None:
    """Prefills and inserts: as needed while no row runs, else one window of prompt tokens.

    With many slots free it is up to `MAX_WINDOWS`: steps cost the same for few rows as for many.
    """
    free = self._slots.count(None)
    lanes = WINDOWS[-1] * int(np.clip(free // 2, 1, MAX_WINDOWS))
    while lanes > 0 or not any(self._slots):
      if not self._held:
        taken = self._room.take()
        if not taken:
          return
        ticket, job = taken
        self._held = ticket, self._batch.begin(job)
        self._metrics.prompt_tokens.inc(len(job.prompt))
        self._metrics.prefix_hits.inc(self._held[1].cached)
      ticket, prefill = self._held
      if not prefill.ready:
        lanes -= self._batch.advance(prefill)
      elif self._slots.count(None) >= prefill.job.num_texts:
        lanes -= WINDOWS[0]
        self._join(ticket, prefill)
      else:
        return

  def _join(self, ticket: Ticket, prefill: Prefill) -> None:
    """A sample, or the thinkers of a prompt, take a row and a slot each."""
    job = prefill.job
    first = job.first_choice + prefill.num_inserted
    free = [number for number, slot in enumerate(self._slots) if slot is None]
    numbers = free[: job.num_texts]
    used = {row.number for row in self._rows()}
    # There are as many rows as slots; a sample's are alike where they can be.
    unused = [number for number in (numbers[0], *range(len(self._slots))) if number not in used]
    row = Row(
      number=unused[0],
      ticket=ticket,
      job=job,
      cached=prefill.cached,
      slots={},
      answers=bool(job.together and job.together.answer_budget),
    )
    self._batch.insert(prefill, row.number, numbers)
    for choice, number in enumerate(numbers, start=first):
      slot = Slot(row=row, choice=choice, last_gain=ticket.submitted)
      self._slots[number] = row.slots[number] = slot
    if prefill.num_inserted == len(job.seeds):
      self._held = None

  def _run(self) -> None:
    """Some steps for every text, and what they gained."""
    by_plan: dict[StepPlan, list[int]] = {}
    for number, slot in enumerate(self._slots):
      if slot and not slot.ended:
        by_plan.setdefault(self._plans[slot.row.job.strategy], []).append(number)
    for plan, numbers in by_plan.items():
      self._step(plan, numbers, share=TURN_SECONDS / len(by_plan))
    seen = np.asarray([slot.seen if slot else UNREAD for slot in self._slots], np.int32)
    gains = self._batch.gains(seen)
    now = self._clock()
    for number, slot in enumerate(self._slots):
      if slot and not slot.ended:
        self._hand_out(number, slot, gains, now)
    for row in self._rows():
      self._settle(row)

  def _step(self, plan: StepPlan, numbers: Sequence[int], *, share: float) -> None:
    """Advances texts of one plan for about `share` seconds: all at once if a group is among them."""
    start, expected = self._clock(), self._step_seconds[plan]
    num_steps = int(np.clip(round(share / max(expected, 1e-6)), 1, MAX_STEPS))
    rows = [slot.row for number in numbers if (slot := self._slots[number])]
    groups = any(row.job.together for row in rows)
    self._batch.run(plan, num_steps, numbers, groups=groups)
    took = (self._clock() - start) / num_steps
    self._step_seconds[plan] = expected + 0.2 * (took - expected)

  def _hand_out(self, number: int, slot: Slot, gains: Sequence[Gains], now: float) -> None:
    reason = StopReason(int(gains[0].stop_reason[number]))
    gain = Gain(
      choice=slot.choice,
      tokens=tokens_of(gains, number, seen=slot.seen, num_top=slot.row.job.num_top),
      stop_reason=reason,
      cached_tokens=slot.row.cached,
    )
    ticket = slot.row.ticket
    self._count(slot, gain, now)
    slot.seen += len(gain.tokens)
    slot.ended = reason is not StopReason.RUNNING
    if ticket.wants(slot.choice):
      ticket.deliver(gain)

  def _count(self, slot: Slot, gain: Gain, now: float) -> None:
    metrics, ticket, count = self._metrics, slot.row.ticket, len(gain.tokens)
    metrics.generated_tokens.inc(count)
    for token in gain.tokens:
      metrics.exit_tokens.labels(token.exit_layer).inc()
    if count and not ticket.first_token_seen:
      ticket.first_token_seen = True
      metrics.first_token.observe(now - ticket.submitted)
    elif count and slot.seen:
      for _ in range(count):
        metrics.per_token.observe((now - slot.last_gain) / count)
    slot.last_gain = now

  def _fail(self, refusal: Refusal) -> None:
    """Refuses everything taken so far and empties the slots."""
    tickets = [row.ticket for row in self._rows()]
    if self._held:
      tickets.append(self._held[0])
    tickets += self._room.clear()
    unique = {id(ticket): ticket for ticket in tickets if not ticket.cancelled}
    self._slots = [None] * len(self._slots)
    self._held = None
    refuse_all(list(unique.values()), refusal)
