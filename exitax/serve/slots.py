"""What the engine remembers of the texts that it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from exitax.decode import Gains
from exitax.serve.jobs import Job, Ticket, Token


@dataclasses.dataclass(eq=False, kw_only=True)
class Slot:
  """A text in use.

  Attributes:
    row: what it shares with its group.
    choice: which sample or thinker of the request.
    seen: tokens handed out.
    last_gain: when, on the engine's clock.
    ended: whether it gains no more; its slot is kept until its whole group has ended.
  """

  row: Row
  choice: int
  seen: int = 0
  last_gain: float = 0.0
  ended: bool = False


@dataclasses.dataclass(eq=False, kw_only=True)
class Row:
  """A row of the cache in use, by a sample or by the thinkers of a prompt.

  Attributes:
    number: of the row.
    ticket: the request.
    job: the prompt.
    cached: tokens of the prompt from the prefix cache.
    slots: its texts, by number.
    answers: whether an answer is still to come.
    past: columns of texts before the answer, once it has begun.
  """

  number: int
  ticket: Ticket
  job: Job
  cached: int
  slots: dict[int, Slot]
  answers: bool
  past: int = 0

  @property
  def given(self) -> int:
    """Columns of the prompt and of headers."""
    return len(self.job.prompt) + self.job.num_header_tokens

  @property
  def ended(self) -> bool:
    """Whether all of its texts have ended."""
    return all(slot.ended for slot in self.slots.values())


def tokens_of(gains: Sequence[Gains], row: int, *, seen: int, num_top: int) -> list[Token]:
  """The new tokens of a row."""
  count = int(gains[0].step[row]) - seen
  found = []
  for part in gains:
    taken = min(count - len(found), part.tokens.shape[1])
    columns = (part.tokens, part.exit_layer, part.confidence, part.log_prob)
    values = [array[row, :taken].tolist() for array in columns]
    tops = [()] * taken
    if num_top:
      ids, log_probs = (
        array[row, :taken, :num_top].tolist() for array in (part.top_ids, part.top_log_probs)
      )
      tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids, log_probs, strict=True)]
    found += [Token(*token) for token in zip(*values, tops, strict=True)]
  return found
