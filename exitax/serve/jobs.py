"""What the engine is asked to do and what it reports: plain values, no HTTP and no arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from exitax.decode import Sampler, Sees, StopReason
from exitax.serve.refusals import Refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together:
  """Thinkers of one prompt who see each other's tokens, and the answer that has read them all.

  Attributes:
    headers: token ids that each thinker's text begins with, one entry per thinker.
    sees: what each sees of the others.
    answer: token ids that the answer begins with.
    answer_budget: tokens of the answer at most; 0 gives none.
  """

  headers: tuple[tuple[int, ...], ...]
  sees: Sees = Sees()
  answer: tuple[int, ...] = ()
  answer_budget: int = 0

  @property
  def size(self) -> int:
    """Thinkers."""
    return len(self.headers)

  @property
  def labels(self) -> tuple[int | None, ...]:
    """Who writes each choice: thinkers from 1, None for the answer."""
    answer = (None,) if self.answer_budget else ()
    return (*range(1, self.size + 1), *answer)

  def slot_width(self, budget: int) -> int:
    """Positions of each thinker."""
    return max(map(len, self.headers)) + budget

  def length(self, budget: int) -> int:
    """Positions, and at most as many columns, of all thinkers and the answer."""
    # An answer begins with something: with nothing of its own, with the prompt's last token once more.
    answer = max(len(self.answer), 1) + self.answer_budget if self.answer_budget else 0
    return self.size * self.slot_width(budget) + answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One prompt, prefilled once, and the samples that continue it.

  Attributes:
    prompt: token ids, at least one.
    seeds: one per sample; one for all thinkers, who differ by their numbers.
    first_choice: number of the first sample among all of the request; thinkers count as samples, and
      the answer is the last.
    together: thinkers in place of samples.
    budget: tokens per sample or thinker at most.
    sampler: how tokens are chosen.
    stop_tokens: ids that end a sample.
    strategy: name of an entry of `Strategies`.
    thresholds: one per exit of the plan.
    num_top: alternatives per token that the request wants to see.
  """

  prompt: tuple[int, ...]
  seeds: tuple[int, ...] = (0,)
  first_choice: int = 0
  together: Together | None = None
  budget: int
  sampler: Sampler = Sampler()
  stop_tokens: tuple[int, ...] = ()
  strategy: str
  thresholds: tuple[float, ...] = ()
  num_top: int = 0

  @property
  def num_choices(self) -> int:
    """Samples, or thinkers and their answer."""
    if self.together is None:
      return len(self.seeds)
    return len(self.together.labels)

  @property
  def num_header_tokens(self) -> int:
    """Tokens that thinkers' texts begin with, of all together."""
    return 0 if self.together is None else sum(map(len, self.together.headers))

  @property
  def num_texts(self) -> int:
    """Texts that go on at once for one insertion."""
    return 1 if self.together is None else self.together.size

  @property
  def length(self) -> int:
    """Tokens of a row, and positions, at most."""
    length = len(self.prompt)
    if self.together is None:
      return length + self.budget
    return length + self.together.length(self.budget)


@dataclasses.dataclass(frozen=True, slots=True)
class Token:
  """One generated token and how it was chosen.

  Attributes:
    token: its id.
    exit_layer: layers run for it.
    confidence: at the exit that chose it.
    log_prob: of it, under the scores that it was chosen from.
    top: the best ids of those scores with their log-probabilities.
  """

  token: int
  exit_layer: int
  confidence: float
  log_prob: float
  top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain:
  """What one sample has gained since its last gain.

  Attributes:
    choice: which sample.
    tokens: in the order of the text; may be none.
    stop_reason: RUNNING unless this is the last gain.
    cached_tokens: tokens of the prompt that the prefix cache had.
  """

  choice: int
  tokens: list[Token]
  stop_reason: StopReason
  cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Failure:
  """The request ends here, with what to answer."""

  refusal: Refusal


Event = Gain | Failure
Deliver = Callable[[Event], None]


class Ticket:
  """A request at the engine: its jobs, where its events go, and whether somebody still listens.

  `cancel` and `stop` may be called from any thread; the engine acts on them before its next step.
  """

  def __init__(self, jobs: Sequence[Job], deliver: Deliver, *, now: float) -> None:
    self.jobs = tuple(jobs)
    self.deliver = deliver
    self.submitted = now
    self.started = False
    self.first_token_seen = False
    self._ended: set[int] = set()
    self._cancelled = False

  def cancel(self) -> None:
    """Nobody listens any more."""
    self._cancelled = True

  def stop(self, choice: int) -> None:
    """The choice has all that it needs, such as the text before a stop string."""
    self._ended.add(choice)

  def wants(self, choice: int) -> bool:
    """Whether the choice should go on."""
    return not self._cancelled and choice not in self._ended

  @property
  def cancelled(self) -> bool:
    """Whether `cancel` was called."""
    return self._cancelled

  @property
  def num_choices(self) -> int:
    """Choices of all jobs."""
    return sum(job.num_choices for job in self.jobs)
