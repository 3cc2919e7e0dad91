"""The held-out split: which documents train, which are kept for evaluation, which are neither.

A document is held out when the hash of its text falls below the fraction, so the choice needs no
seed, does not move when other documents come or go, and exact copies fall on the same side. A
training document that is too near to a held-out one is then dropped: near is the overlap
coefficient of their sets of word shingles, `|A & B| / min(|A|, |B|)`, which also sees a document
quoted whole inside a longer one. Sets are compared exactly, by sorted 64-bit hashes: only pairs of
(training, held-out) count, so this is linear in the corpus and no MinHash sketch is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Sequence

import numpy as np

from exitax.data.progress import Progress, quiet
from exitax.data.sources import Document
from exitax.errors import UserError

_WORD = re.compile(r'\w+|[^\w\s]')
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class SplitConfig:
  """How documents are held out.

  Attributes:
    fraction: share of documents held out, in [0, 1); 0 holds none out.
    similarity: overlap coefficient in (0, 1] from which a training document is dropped.
    shingle_words: consecutive words (or punctuation marks) in a shingle.
  """

  fraction: float = 0.05
  similarity: float = 0.5
  shingle_words: int = 8

  def __post_init__(self) -> None:
    """Raises UserError for a value out of range."""
    if not 0 <= self.fraction < 1:
      raise UserError(f'held-out fraction={self.fraction} is outside [0, 1): choose such as 0.05')
    if not 0 < self.similarity <= 1:
      raise UserError(f'similarity={self.similarity} is outside (0, 1]: choose such as 0.5')
    if self.shingle_words < 1:
      raise UserError(f'shingle_words={self.shingle_words} is below 1: choose such as 8')


@dataclasses.dataclass(frozen=True)
class Split:
  """Documents by fate: `train`, `held_out`, and `dropped` for being near a held-out one."""

  train: tuple[Document, ...]
  held_out: tuple[Document, ...]
  dropped: tuple[Document, ...]


def split_documents(
  corpora: Sequence[Sequence[Document]], *, config: SplitConfig, progress: Progress = quiet
) -> list[Split]:
  """One `Split` for each corpus; near-duplicates are looked for across all of them.

  Every corpus with two documents or more gets at least one held-out document (the one with the
  lowest hash) when the fraction is above 0, and keeps at least one outside it.

  Raises:
    UserError: a corpus has too few documents to be split, or none is left to train on.
  """
  masks = [choose_held_out(documents, fraction=config.fraction) for documents in corpora]
  held_out = [
    tuple(itertools.compress(documents, mask))
    for documents, mask in zip(corpora, masks, strict=True)
  ]
  index = ShingleIndex([document for part in held_out for document in part], config=config)
  total = sum(len(documents) for documents in corpora)
  # One bar over all corpora: each of the loops below takes its own documents from it.
  shown = progress(itertools.chain.from_iterable(corpora), total=total, label='near-duplicates')
  splits = []
  for mask, part in zip(masks, held_out, strict=True):
    train: list[Document] = []
    dropped: list[Document] = []
    for held, document in zip(mask, shown):  # noqa: B905  (`shown` goes on to the next corpus)
      if not held:
        near = index.similarity(document.text) >= config.similarity
        (dropped if near else train).append(document)
    if not train:
      raise UserError(
        f'all {len(dropped)} training documents are near-duplicates of held-out ones '
        f'(similarity >= {config.similarity}): bring more varied text or raise similarity'
      )
    splits.append(Split(train=tuple(train), held_out=part, dropped=tuple(dropped)))
  return splits


def choose_held_out(documents: Sequence[Document], *, fraction: float) -> list[bool]:
  """For each document, whether it is held out by the hash of its text.

  Raises:
    UserError: fewer than two different documents, with a fraction above 0.
  """
  if fraction == 0:
    return [False] * len(documents)
  ranks = [text_rank(document.text) for document in documents]
  if len(set(ranks)) < 2:
    raise UserError(
      f'{len(set(ranks))} different document(s) cannot be split into training and held-out: '
      'bring at least 2 documents, lower document_bytes, or set the held-out fraction to 0'
    )
  limit = min(max(fraction, min(ranks)), max(np.nextafter(max(ranks), 0), 0))
  return [rank <= limit for rank in ranks]


def text_rank(text: str) -> float:
  """A number in [0, 1) that depends on the text alone: the head of its SHA-256."""
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], 'big') / 2**48


def shingle_hashes(text: str, *, shingle_words: int) -> np.ndarray:
  """The set of hashed word shingles of `text`: uint64, sorted, each once.

  Words are runs of word characters or single marks, in lower case; white space does not count. A
  text shorter than a shingle has one, of all its words.
  """
  words = _WORD.findall(text.lower())
  if not words:
    return np.zeros(0, np.uint64)
  ids = {word: _word_hash(word) for word in set(words)}
  hashes = np.fromiter((ids[word] for word in words), np.uint64, len(words))
  span = min(shingle_words, len(words))
  count = len(words) - span + 1
  mixed = np.zeros(count, np.uint64)
  for offset in range(span):
    mixed = (mixed ^ hashes[offset : offset + count]) * _MULTIPLIER  # Wraps around: a hash.
    mixed ^= mixed >> np.uint64(29)
  return np.unique(mixed)


def _word_hash(word: str) -> int:
  return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), 'big')


class ShingleIndex:
  """The shingles of held-out documents, to ask how near another text comes to any of them."""

  def __init__(self, documents: Sequence[Document], *, config: SplitConfig) -> None:
    """Indexes `documents`; memory is 16 bytes a shingle."""
    self._shingle_words = config.shingle_words
    sets = [shingle_hashes(d.text, shingle_words=config.shingle_words) for d in documents]
    self._sizes = np.array([len(shingles) for shingles in sets], np.int64)
    hashes = np.concatenate([*sets, np.zeros(0, np.uint64)])
    owners = np.repeat(np.arange(len(sets)), self._sizes)
    order = np.argsort(hashes, kind='stable')
    self._hashes, self._owners = hashes[order], owners[order]

  def similarity(self, text: str) -> float:
    """The largest overlap coefficient of `text` with an indexed document, 0 if there is none."""
    shingles = shingle_hashes(text, shingle_words=self._shingle_words)
    if not len(shingles) or not len(self._hashes):
      return 0.0
    first = np.searchsorted(self._hashes, shingles, side='left')
    last = np.searchsorted(self._hashes, shingles, side='right')
    shared = np.zeros(len(self._sizes), np.int64)
    # A shingle may stand in several documents: walk through its run of equal hashes.
    while (alive := first < last).any():
      first, last = first[alive], last[alive]
      shared += np.bincount(self._owners[first], minlength=len(self._sizes))
      first = first + 1
    return float((shared / np.minimum(self._sizes, len(shingles))).max())
