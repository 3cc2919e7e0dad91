"""What a corpus amounts to, as numbers that go into logs and results."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class PartStats:
  """The size of the training or the held-out part.

  Attributes:
    documents: how many.
    bytes: UTF-8 bytes of their texts; the weighted targets of the part cover exactly these.
    tokens: ids in the stream, with a start and an end for every document.
  """

  documents: int
  bytes: int
  tokens: int

  @property
  def targets(self) -> int:
    """Ids that are predicted: all but the start of each document. The sum of all weights."""
    return self.tokens - self.documents

  @property
  def bytes_per_target(self) -> float:
    """UTF-8 bytes a target covers; 0 for an empty part.

    Bits per byte of a part are its mean loss (nats per weighted target) / ln 2 / this.
    """
    return self.bytes / self.targets if self.targets else 0.0


def total(parts: Iterable[PartStats]) -> PartStats:
  """The sum of `parts`."""
  parts = list(parts)
  return PartStats(
    documents=sum(part.documents for part in parts),
    bytes=sum(part.bytes for part in parts),
    tokens=sum(part.tokens for part in parts),
  )


@dataclasses.dataclass(frozen=True)
class TaskStats:
  """One task: `corpus_digest` is of all its documents, `near_duplicates` were dropped."""

  name: str
  corpus_digest: str
  train: PartStats
  held_out: PartStats
  near_duplicates: int


@dataclasses.dataclass(frozen=True)
class CorpusStats:
  """All tasks of a mixture, in its order."""

  tasks: tuple[TaskStats, ...]

  @property
  def train(self) -> PartStats:
    """All training parts together."""
    return total(task.train for task in self.tasks)

  @property
  def held_out(self) -> PartStats:
    """All held-out parts together."""
    return total(task.held_out for task in self.tasks)

  @property
  def near_duplicates(self) -> int:
    """Training documents dropped for being near a held-out one."""
    return sum(task.near_duplicates for task in self.tasks)

  def summary(self) -> dict[str, object]:
    """The same as JSON-able values, for logs."""
    return {
      'train': dataclasses.asdict(self.train),
      'held_out': dataclasses.asdict(self.held_out),
      'near_duplicates': self.near_duplicates,
      'bytes_per_token': round(self.train.bytes_per_target, 4),
      'tasks': [dataclasses.asdict(task) for task in self.tasks],
    }
