"""Documents to token streams: read, split, tokenised once, kept in the cache.

The split covers all tasks of a mixture together, so a training document of one task that is near a
held-out document of another is dropped as well.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from exitax.data.cache import cached_folder, key_of
from exitax.data.packing import TokenStream, token_stream
from exitax.data.progress import Progress, quiet
from exitax.data.sources import Document, corpus_digest, read_documents
from exitax.data.splits import Split, SplitConfig, split_documents
from exitax.data.stats import CorpusStats, PartStats, TaskStats
from exitax.data.tasks import Mixture, Task
from exitax.data.tokenizers import Tokenizer

_FORMAT = 1
_CHUNK = 64  # Documents tokenised at a time, so that a bar can move.
_PARTS = ('train', 'held_out')


@dataclasses.dataclass(frozen=True)
class TokenisedTask:
  """The streams of one task, memory-mapped."""

  name: str
  train: TokenStream
  held_out: TokenStream


@dataclasses.dataclass(frozen=True)
class TokenisedCorpus:
  """All tasks of a mixture, in its order; `digest` names texts, split and tokenizer together."""

  tasks: tuple[TokenisedTask, ...]
  stats: CorpusStats
  digest: str


class Corpus:
  """The documents of a mixture; the split is worked out only when something needs it."""

  def __init__(self, mixture: Mixture, *, split: SplitConfig, progress: Progress = quiet) -> None:
    """Reads all documents into memory.

    Raises:
      UserError: a source cannot be read or has no text.
    """
    tasks = [item.task for item in mixture.tasks if isinstance(item.task, Task)]
    self.names = [task.name for task in tasks]
    self._documents = [read_documents(task.source) for task in tasks]
    self._split_config = split
    self._progress = progress
    self.digests = [corpus_digest(documents) for documents in self._documents]
    # What the split depends on, and so all that is derived from it.
    self.identity = {
      'format': _FORMAT,
      'tasks': list(zip(self.names, self.digests, strict=True)),
      'split': dataclasses.asdict(split),
    }

  @functools.cached_property
  def splits(self) -> list[Split]:
    """One split for each task. Raises UserError where a corpus cannot be split."""
    return split_documents(self._documents, config=self._split_config, progress=self._progress)

  def train_texts(self) -> list[str]:
    """The training texts of all tasks: what a tokenizer may learn from."""
    return [document.text for split in self.splits for document in split.train]

  def tokenise(self, tokenizer: Tokenizer, *, root: Path) -> TokenisedCorpus:
    """The token streams of all tasks, from the cache below `root` or made now."""
    key = key_of({**self.identity, 'tokenizer': tokenizer.digest})
    folder = cached_folder(
      root / 'tokens' / key, write_fn=functools.partial(self._write, tokenizer=tokenizer)
    )
    return TokenisedCorpus(
      tasks=tuple(
        TokenisedTask(
          name=name,
          train=_load_stream(folder, part='train', index=index),
          held_out=_load_stream(folder, part='held_out', index=index),
        )
        for index, name in enumerate(self.names)
      ),
      stats=_load_stats(folder / 'stats.json'),
      digest=key,
    )

  def _write(self, folder: Path, *, tokenizer: Tokenizer) -> None:
    tasks = []
    for index, (name, split) in enumerate(zip(self.names, self.splits, strict=True)):
      parts = {}
      for part, documents in zip(_PARTS, (split.train, split.held_out), strict=True):
        stream = token_stream(
          self._encoded(documents, tokenizer=tokenizer, label=f'tokenising {name} {part}'),
          tokenizer=tokenizer,
        )
        np.save(folder / f'{index}-{part}-tokens.npy', stream.tokens)
        np.save(folder / f'{index}-{part}-offsets.npy', stream.offsets)
        size = sum(len(document.text.encode()) for document in documents)
        parts[part] = PartStats(documents=len(documents), bytes=size, tokens=len(stream.tokens))
      tasks.append(
        TaskStats(
          name=name,
          corpus_digest=self.digests[index],
          train=parts['train'],
          held_out=parts['held_out'],
          near_duplicates=len(split.dropped),
        )
      )
    record = [dataclasses.asdict(task) for task in tasks]
    (folder / 'stats.json').write_text(json.dumps(record, indent=2) + '\n')

  def _encoded(
    self, documents: Sequence[Document], *, tokenizer: Tokenizer, label: str
  ) -> Iterator[list[int]]:
    chunks = [documents[i : i + _CHUNK] for i in range(0, len(documents), _CHUNK)]
    for chunk in self._progress(chunks, total=len(chunks), label=label):
      yield from tokenizer.encode_batch([document.text for document in chunk])


def _load_stream(folder: Path, *, part: str, index: int) -> TokenStream:
  return TokenStream(
    tokens=np.load(folder / f'{index}-{part}-tokens.npy', mmap_mode='r'),
    offsets=np.load(folder / f'{index}-{part}-offsets.npy'),
  )


def _load_stats(path: Path) -> CorpusStats:
  return CorpusStats(
    tasks=tuple(
      TaskStats(
        name=task['name'],
        corpus_digest=task['corpus_digest'],
        train=PartStats(**task['train']),
        held_out=PartStats(**task['held_out']),
        near_duplicates=task['near_duplicates'],
      )
      for task in json.loads(path.read_bytes())
    )
  )
