"""Which tokenizer a run uses, as a configuration says it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ByteVocabulary:
  """Bytes as tokens."""


@dataclasses.dataclass(frozen=True)
class BpeVocabulary:
  """A byte-level BPE learnt from the training documents; `vocab_size` is an upper bound."""

  vocab_size: int = 4096


@dataclasses.dataclass(frozen=True)
class SavedVocabulary:
  """A tokenizer from a folder or a `tokenizer.json`."""

  path: str


Vocabulary = ByteVocabulary | BpeVocabulary | SavedVocabulary
