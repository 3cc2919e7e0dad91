"""The queue: bounded, in order, all of a request or nothing."""

from __future__ import annotations

import pytest

from exitax.serve.admission import WaitingRoom
from exitax.serve.jobs import Job, Ticket
from exitax.serve.refusals import Refusal


def ticket(count: int = 1, *, now: float = 0.0) -> Ticket:
  jobs = [Job(prompt=(number,), budget=1, strategy='full') for number in range(count)]
  return Ticket(jobs, lambda event: None, now=now)


@pytest.fixture
def room() -> WaitingRoom:
  return WaitingRoom(capacity=3, slots=2, queue_timeout=10.0)


def test_first_come_first_served(room: WaitingRoom):
  first, second = ticket(2), ticket(1)
  room.enter(first, free_slots=0)
  room.enter(second, free_slots=0)
  taken = [room.take() for _ in range(4)]
  assert [t and (t[0], t[1].prompt) for t in taken] == [
    (first, (0,)),
    (first, (1,)),
    (second, (0,)),
    None,
  ]


def test_all_jobs_enter_or_none(room: WaitingRoom):
  room.enter(ticket(2), free_slots=0)
  with pytest.raises(Refusal, match='2 prompts wait and the queue holds 3') as refused:
    room.enter(ticket(2), free_slots=0)
  assert refused.value.status == 429
  assert len(room) == 2


def test_free_slots_make_room(room: WaitingRoom):
  room.enter(ticket(5), free_slots=2)
  assert len(room) == 5


def test_what_could_never_enter_is_not_asked_to_try_again(room: WaitingRoom):
  with pytest.raises(
    Refusal, match=r'6 prompts are more .* at once, 5 .* several requests'
  ) as refused:
    room.enter(ticket(6), free_slots=2)
  assert (refused.value.status, refused.value.retry_after) == (400, None)


def test_the_cancelled_are_passed_over(room: WaitingRoom):
  gone, here = ticket(2), ticket()
  room.enter(gone, free_slots=0)
  room.enter(here, free_slots=0)
  gone.cancel()
  taken = room.take()
  assert taken is not None
  assert taken[0] is here


def test_only_those_that_have_not_started_expire(room: WaitingRoom):
  started, late, early = ticket(2), ticket(), ticket(now=5.0)
  room.enter(started, free_slots=0)
  room.take()
  room.enter(late, free_slots=0)
  room.enter(early, free_slots=0)
  assert room.expire(10.0) == []
  assert room.expire(10.5) == [late]
  assert len(room) == 2
  assert room.clear() == [started, early]
  assert len(room) == 0


def test_the_cancelled_expire_silently(room: WaitingRoom):
  gone = ticket()
  room.enter(gone, free_slots=0)
  gone.cancel()
  assert room.expire(100.0) == []
  assert len(room) == 0
