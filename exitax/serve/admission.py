"""Admission: a bounded queue, first come first served, from which prompts are taken or expire."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence

from exitax.serve.jobs import Failure, Job, Ticket
from exitax.serve.refusals import Refusal, bad_request, queue_full


class WaitingRoom:
  """Jobs that wait for the engine. Safe to use from several threads.

  All jobs of a ticket enter together or not at all, and wait `queue_timeout` seconds at most: once
  the first of them has been taken, the rest stay as long as it takes.
  """

  def __init__(self, *, capacity: int, slots: int, queue_timeout: float) -> None:
    """Starts empty.

    Args:
      capacity: prompts that may wait.
      slots: prompts beyond the capacity that an idle engine would take at once.
      queue_timeout: seconds that a ticket waits at most.
    """
    self._capacity, self._slots, self._queue_timeout = capacity, slots, queue_timeout
    self._waiting: collections.deque[tuple[Ticket, Job]] = collections.deque()
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return len(self._waiting)

  def enter(self, ticket: Ticket, *, free_slots: int) -> None:
    """Queues the jobs of a ticket.

    Args:
      ticket: all of its jobs.
      free_slots: prompts beyond the capacity that would be taken at once.

    Raises:
      Refusal: 429, the queue is full; 400, even an empty one would not hold them.
    """
    count, most = len(ticket.jobs), self._capacity + self._slots
    if count > most:
      raise bad_request(
        f'{count} prompts are more than this server holds at once, {most} (--max_queue and '
        '--num_slots): send them in several requests',
        param='prompt',
      )
    with self._lock:
      if len(self._waiting) + count > self._capacity + free_slots:
        raise queue_full(len(self._waiting), self._capacity, retry_after=1)
      self._waiting.extend((ticket, job) for job in ticket.jobs)

  def is_late(self, ticket: Ticket, now: float) -> bool:
    """Whether a ticket has waited as long as it may."""
    return now - ticket.submitted > self._queue_timeout

  def take(self) -> tuple[Ticket, Job] | None:
    """The job that has waited longest and is still wanted, or None."""
    with self._lock:
      while self._waiting:
        ticket, job = self._waiting.popleft()
        if not ticket.cancelled:
          ticket.started = True
          return ticket, job
    return None

  def leave(self, ticket: Ticket) -> None:
    """Removes what is left of a ticket."""
    self._keep(lambda other: other is not ticket)

  def expire(self, now: float) -> list[Ticket]:
    """Removes and returns tickets that have waited too long; cancelled ones go without a word."""
    late = {
      id(ticket): ticket
      for ticket, _ in tuple(self._waiting)
      if not ticket.started and not ticket.cancelled
      if self.is_late(ticket, now)
    }
    self._keep(lambda ticket: id(ticket) not in late and not ticket.cancelled)
    return list(late.values())

  def clear(self) -> list[Ticket]:
    """Removes everything; returns the tickets that nobody had cancelled."""
    with self._lock:
      tickets = {id(ticket): ticket for ticket, _ in self._waiting if not ticket.cancelled}
      self._waiting.clear()
    return list(tickets.values())

  def _keep(self, wanted: Callable[[Ticket], bool]) -> None:
    with self._lock:
      if not all(wanted(ticket) for ticket, _ in self._waiting):
        kept = [(ticket, job) for ticket, job in self._waiting if wanted(ticket)]
        self._waiting = collections.deque(kept)


def refuse_all(tickets: Sequence[Ticket], refusal: Refusal) -> None:
  """Ends tickets with the same answer."""
  for ticket in tickets:
    ticket.deliver(Failure(refusal))
    ticket.cancel()
