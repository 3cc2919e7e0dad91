"""Data of groups of thinkers: problems from generators, solved by teachers, as rows to train on."""

from __future__ import annotations

import dataclasses
from typing import Any

from exitax.data.cache import key_of
from exitax.data.evaluation import EvalLoader
from exitax.data.group_rows import GroupMix, GroupRows
from exitax.data.group_tasks import (
  EnumerationTask,
  FloydWarshallTask,
  Task,
  TemplateTask,
  TreeSumTask,
)
from exitax.data.loader import TrainLoader, TrainRows
from exitax.data.shard import WHOLE, Shards
from exitax.data.stats import CorpusStats, PartStats, TaskStats
from exitax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from exitax.data.vocabulary import ByteVocabulary, SavedVocabulary
from exitax.errors import UserError

GROUP_TASKS: dict[str, Task] = {
  task.name: task
  for task in (EnumerationTask(), FloydWarshallTask(), TreeSumTask(), TemplateTask())
}
# A character is a token and a byte.
_PART = PartStats(documents=0, bytes=1, tokens=1)
_EVALUATION = 1  # Added to a seed: rows of training and evaluation have nothing in common.


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupDataConfig:
  """What groups are trained on; in place of `DataConfig`.

  Attributes:
    tasks: names of `GROUP_TASKS`, or tasks; each gives as many rows as the others.
    mix: how many think, and what they see of each other.
    vocabulary: `ByteVocabulary`, or the tokenizer of a model that is trained on.
    length: tokens in a row: a prompt and the texts of a group.
    batch_size: rows of a global training batch, over all processes.
    eval_batch_size: rows of a global evaluation batch; None is `batch_size`.
    eval_rows: rows that training never sees, per task.
    seed: decides every row.
  """

  tasks: tuple[str | Task, ...] = ('enumeration',)
  mix: GroupMix = GroupMix()
  vocabulary: ByteVocabulary | SavedVocabulary = ByteVocabulary()
  length: int = 256
  batch_size: int = 8
  eval_batch_size: int | None = None
  eval_rows: int = 256
  seed: int = 0

  def __post_init__(self) -> None:
    object.__setattr__(self, 'tasks', tuple(self.tasks))
    if not self.tasks:
      raise UserError('GroupDataConfig.tasks is empty: give at least one')
    for name in ('length', 'batch_size', 'eval_batch_size', 'eval_rows'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(f'{name}={value} must be at least 1')
    if self.seed < 0:
      raise UserError(f'data seed={self.seed} is negative: choose 0 or more')
    for task in self.tasks:
      find_group_task(task)


def find_group_task(task: str | Task) -> Task:
  """The task of a name.

  Raises:
    UserError: there is none.
  """
  if not isinstance(task, str):
    return task
  if task not in GROUP_TASKS:
    raise UserError(f'no task {task!r} for groups: choose {", ".join(GROUP_TASKS)}')
  return GROUP_TASKS[task]


@dataclasses.dataclass(frozen=True)
class GroupData:
  """Tokenizer, loaders and numbers of one configuration; used as `Data` is."""

  config: GroupDataConfig
  tokenizer: Tokenizer

  @property
  def tasks(self) -> tuple[Task, ...]:
    """The tasks of the configuration."""
    return tuple(map(find_group_task, self.config.tasks))

  @property
  def digest(self) -> str:
    """Names tasks, teachers and tokenizer together."""
    config = self.config
    return key_of(
      {
        'tasks': [[task.name, repr(task)] for task in self.tasks],
        'mix': repr(config.mix),
        'length': config.length,
        'tokenizer': self.tokenizer.digest,
        'seed': config.seed,
      }
    )

  @property
  def stats(self) -> CorpusStats:
    """Rows are made as they are asked for: only bytes per target mean something, and are 1."""
    return CorpusStats(
      tuple(
        TaskStats(task.name, self.digest, train=_PART, held_out=_PART, near_duplicates=0)
        for task in self.tasks
      )
    )

  def train_loader(self, shard: Shards = WHOLE) -> TrainLoader:
    """A new endless loader, at its first batch; raises as `Data.train_loader`."""
    rows = [TrainRows(name=task.name, rows=self._rows(task, 0)) for task in self.tasks]
    return TrainLoader(
      rows,
      batch_size=self.config.batch_size,
      seed=self.config.seed,
      corpus_digest=self.digest,
      shard=shard,
    )

  def eval_loader(self, shard: Shards = WHOLE, *, max_rows: int | None = None) -> EvalLoader:
    """Rows that training never sees; `max_rows` spreads over all tasks."""
    count = self.config.eval_rows
    return EvalLoader(
      [self._rows(task, _EVALUATION, count=count) for task in self.tasks],
      batch_size=self.config.eval_batch_size or self.config.batch_size,
      shard=shard,
      max_rows=max_rows,
    )

  def check_context(self, max_length: int) -> None:
    """Raises UserError if thinkers' positions exceed the context of a model."""
    for task in self.tasks:
      last = self._rows(task, _EVALUATION).last_position()
      if last > max_length:
        mix = self.config.mix
        raise UserError(
          f'prompts of {task.name} and {mix.slots} slots of {mix.slot_width} need {last} positions, '
          f'max_length={max_length}: lengthen the context, or take fewer or narrower slots'
        )

  def _rows(self, task: Task, part: int, **count: Any) -> GroupRows:
    return GroupRows(
      task,
      self.config.mix,
      tokenizer=self.tokenizer,
      length=self.config.length,
      # Tasks do not share rows either, nor do neighbouring seeds.
      seed=int(key_of({'seed': self.config.seed, 'task': repr(task), 'part': part})[:8], 16),
      **count,
    )


def build_group_data(config: GroupDataConfig, *, tokenizer: Tokenizer | None = None) -> GroupData:
  """Data of groups; `tokenizer` (a checkpoint's) in place of the configuration's."""
  if tokenizer is None:
    match config.vocabulary:
      case SavedVocabulary(path=path):
        tokenizer = load_tokenizer(path)
      case _:
        tokenizer = ByteTokenizer()
  return GroupData(config=config, tokenizer=tokenizer)
