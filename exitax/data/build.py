"""One call from a configuration to everything that training and evaluation need of the data."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import overload

from exitax.data.cache import cache_root, cached_folder, key_of
from exitax.data.corpus import Corpus, TokenisedCorpus
from exitax.data.evaluation import EvalLoader
from exitax.data.group_data import GroupData, GroupDataConfig, build_group_data
from exitax.data.huggingface import BpeTokenizer
from exitax.data.loader import TrainLoader, TrainRows
from exitax.data.packing import PackedRows, TokenStream
from exitax.data.progress import Progress, progress_bar
from exitax.data.shard import WHOLE, Shards
from exitax.data.splits import SplitConfig
from exitax.data.stats import CorpusStats
from exitax.data.tasks import Mixture, Task, resolve
from exitax.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from exitax.data.vocabulary import BpeVocabulary, ByteVocabulary, SavedVocabulary, Vocabulary
from exitax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What to train and evaluate on.

  Attributes:
    mixture: a registered name, a `Task` or a `Mixture`.
    vocabulary: which tokenizer.
    length: tokens in a row.
    batch_size: rows of a global training batch, over all processes.
    eval_batch_size: rows of a global evaluation batch; None is `batch_size`.
    seed: decides the order of the training rows.
    split: how documents are held out.
    cache_dir: where tokenised text is kept; None is $EXITAX_CACHE_DIR or `~/.cache/exitax`.
  """

  mixture: str | Task | Mixture = 'python_library'
  vocabulary: Vocabulary = BpeVocabulary()
  length: int = 256
  batch_size: int = 8
  eval_batch_size: int | None = None
  seed: int = 0
  split: SplitConfig = SplitConfig()
  cache_dir: str | None = None

  def __post_init__(self) -> None:
    for name in ('length', 'batch_size', 'eval_batch_size'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise UserError(f'{name}={value} must be at least 1')


@dataclasses.dataclass(frozen=True)
class Data:
  """Tokenizer, loaders and numbers of one configuration."""

  config: DataConfig
  mixture: Mixture
  tokenizer: Tokenizer
  corpus: TokenisedCorpus

  @property
  def stats(self) -> CorpusStats:
    """Documents, bytes and tokens of each part."""
    return self.corpus.stats

  @property
  def digest(self) -> str:
    """Names texts, split and tokenizer together."""
    return self.corpus.digest

  def train_loader(self, shard: Shards = WHOLE) -> TrainLoader:
    """A new endless loader of the training part, at its first batch.

    Raises:
      UserError: grain is missing, or `batch_size` does not suit the processes.
    """
    rows = [
      TrainRows(name=task.name, rows=self._rows(task.train), weight=item.weight)
      for task, item in zip(self.corpus.tasks, self.mixture.tasks, strict=True)
    ]
    return TrainLoader(
      rows,
      batch_size=self.config.batch_size,
      seed=self.config.seed,
      corpus_digest=self.digest,
      shard=shard,
    )

  def eval_loader(
    self, shard: Shards = WHOLE, *, task: str | None = None, max_rows: int | None = None
  ) -> EvalLoader:
    """The held-out part of one task, or of all in order; `max_rows` spreads over all of it.

    Raises:
      UserError: no such task, or nothing is held out.
    """
    names = [entry.name for entry in self.corpus.tasks]
    if task is not None and task not in names:
      raise UserError(f'no task {task!r} in this mixture: choose one of {", ".join(names)}')
    chosen = [entry for entry in self.corpus.tasks if task in (None, entry.name)]
    return EvalLoader(
      [self._rows(entry.held_out) for entry in chosen],
      batch_size=self.config.eval_batch_size or self.config.batch_size,
      shard=shard,
      max_rows=max_rows,
    )

  def check_context(self, max_length: int) -> None:
    """Positions of documents stay below the length of a row, which the run has compared."""
    del max_length

  def _rows(self, stream: TokenStream) -> PackedRows:
    return PackedRows(stream, length=self.config.length, pad_id=self.tokenizer.pad_id)


@overload
def build_data(
  config: DataConfig, *, tokenizer: Tokenizer | None = None, progress: Progress = progress_bar
) -> Data: ...
@overload
def build_data(
  config: GroupDataConfig, *, tokenizer: Tokenizer | None = None, progress: Progress = progress_bar
) -> GroupData: ...
def build_data(
  config: DataConfig | GroupDataConfig,
  *,
  tokenizer: Tokenizer | None = None,
  progress: Progress = progress_bar,
) -> Data | GroupData:
  """Reads, splits and tokenises the corpus of `config`, or finds it in the cache.

  Args:
    config: what to load.
    tokenizer: use this one (a checkpoint's) in place of `config.vocabulary`.
    progress: how long steps show themselves.

  Raises:
    UserError: anything about the corpus, tokenizer, split or cache that a user can mend.
  """
  if isinstance(config, GroupDataConfig):
    return build_group_data(config, tokenizer=tokenizer)
  mixture = resolve(config.mixture)
  corpus = Corpus(mixture, split=config.split, progress=progress)
  root = cache_root(config.cache_dir)
  if tokenizer is None:
    tokenizer = build_tokenizer(config.vocabulary, corpus=corpus, root=root, progress=progress)
  return Data(
    config=config,
    mixture=mixture,
    tokenizer=tokenizer,
    corpus=corpus.tokenise(tokenizer, root=root),
  )


def build_tokenizer(
  vocabulary: Vocabulary, *, corpus: Corpus, root: Path, progress: Progress
) -> Tokenizer:
  """The tokenizer that `vocabulary` describes; a trained one is kept in the cache below `root`."""
  match vocabulary:
    case ByteVocabulary():
      return ByteTokenizer()
    case SavedVocabulary(path=path):
      return load_tokenizer(path)
    case BpeVocabulary(vocab_size=vocab_size):
      key = key_of({**corpus.identity, 'bpe': vocab_size})
      write_fn = functools.partial(
        _train_bpe, corpus=corpus, vocab_size=vocab_size, progress=progress
      )
      return load_tokenizer(cached_folder(root / 'tokenizers' / key, write_fn=write_fn))


def _train_bpe(folder: Path, *, corpus: Corpus, vocab_size: int, progress: Progress) -> None:
  texts = corpus.train_texts()
  BpeTokenizer.train(texts, vocab_size=vocab_size, total=len(texts), progress=progress).save(folder)
