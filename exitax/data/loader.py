"""Endless shuffled training batches with a state that resumes bitwise; the only importer of grain.

Each task is shuffled anew every epoch by a seed of its own and repeats for ever; the mixture draws
rows from the tasks in a fixed pattern of their weights. Step `s` of the whole job is rows
`[s * batch_size, (s + 1) * batch_size)` of that sequence, of which a process takes one `n`-th part
or several: those that its devices hold. So the parts put together are what one host alone would
see, and a state saved on `n` processes may be restored on another number. (The weights hold for
whole batches; one host's part of them may lean to a task.)
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from exitax.data.batch import Batch, concatenate, stack_rows
from exitax.data.cache import key_of
from exitax.data.group_rows import GroupRows
from exitax.data.packing import PackedRows
from exitax.data.shard import WHOLE, Shard, Shards, parts_of
from exitax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainRows:
  """The rows of one task and their share of the mixture."""

  name: str
  rows: PackedRows | GroupRows
  weight: float = 1.0


class TrainLoader(Iterator[Batch]):
  """Batches `[batch_size / process_count, length]` of NumPy arrays, for ever.

  With several shards a batch holds the rows of each, one after the other.
  """

  def __init__(
    self,
    tasks: Sequence[TrainRows],
    *,
    batch_size: int,
    seed: int,
    corpus_digest: str,
    shard: Shards = WHOLE,
    prefetch: int = 4,
  ) -> None:
    """Starts at the first batch.

    Args:
      tasks: at least one, each with a row or more.
      batch_size: rows of a global batch, over all processes.
      seed: decides the order of the rows; 0 or more.
      corpus_digest: names what the rows hold, to refuse a state of other data.
      shard: the part of this process.
      prefetch: batches made ahead by one background thread.

    Raises:
      UserError: grain is missing, or a number is out of range.
    """
    if seed < 0:
      raise UserError(f'data seed={seed} is negative: choose 0 or more')
    self._grain = _import_grain()
    self._digest = key_of(
      {
        'corpus': corpus_digest,
        'tasks': [[task.name, task.rows.length, task.weight] for task in tasks],
        'batch_size': batch_size,
        'seed': seed,
      }
    )
    options = self._grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    mixed = self._mixed(tasks, seed=seed)
    # All stand at the same batch always, so the state of one is the state of all.
    self._iterators = [
      iter(_part(mixed, part, batch_size=batch_size).to_iter_dataset(options))
      for part in parts_of(shard)
    ]

  def _mixed(self, tasks: Sequence[TrainRows], *, seed: int) -> Any:
    endless = []
    for index, task in enumerate(tasks):
      task_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
      rows = self._grain.MapDataset.source(task.rows).seed(task_seed)
      endless.append(rows.shuffle().repeat())
    if len(endless) == 1:
      return endless[0]
    return self._grain.MapDataset.mix(endless, weights=[task.weight for task in tasks])

  def __next__(self) -> Batch:
    """The next batch of this process."""
    parts = [next(iterator) for iterator in self._iterators]
    return parts[0] if len(parts) == 1 else concatenate(parts)

  def get_state(self) -> dict[str, Any]:
    """Where the loader stands, as JSON-able values; the same on every process."""
    return {'format': 1, 'digest': self._digest, 'grain': dict(self._iterators[0].get_state())}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on from `state`: the batches that follow are bitwise those that followed then.

    Raises:
      UserError: the state is of other data, another seed, length, batch size or mixture.
    """
    if state.get('digest') != self._digest:
      raise UserError(
        f'the saved data state ({str(state.get("digest"))[:12]}) belongs to other data than this '
        f'run ({self._digest[:12]}): corpus, tokenizer, split, mixture, length, batch_size and seed '
        'must be those it was saved with, or start in a new model directory'
      )
    for iterator in self._iterators:
      iterator.set_state(state['grain'])


def _part(rows: Any, shard: Shard, *, batch_size: int) -> Any:
  """The batches of one shard, of rows without end."""
  local = shard.local_batch_size(batch_size)
  # drop_remainder only because the length is otherwise rounded up in floating point, and an
  # endless one then no longer fits into an index.
  batches = rows.batch(local, drop_remainder=True, batch_fn=stack_rows)
  return batches[shard.process_index :: shard.process_count]


def _import_grain() -> Any:
  try:
    return importlib.import_module('grain')
  except ImportError:
    raise UserError('training data needs the grain package: pip install grain') from None
