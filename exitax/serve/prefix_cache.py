"""Prefixes of prompts that were prefilled before, in chunks, least recently used out first.

A prompt is cut into chunks of a fixed number of tokens; only whole chunks are kept. A chunk is known
by its tokens *and* all tokens before it, so prompts share what they have in common from the start
and nothing else.

Miniature, chunks of 2: after `[1 2 3 4 5]` the cache holds `1 2` and `1 2 | 3 4`. The prompt
`[1 2 9 9]` finds `1 2`; `[3 4 1 2]` finds nothing.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

Chunk = TypeVar('Chunk')


class PrefixCache(Generic[Chunk]):
  """Chunks of keys and values by the tokens that lead to them. For one thread."""

  def __init__(self, *, chunk: int, chunk_bytes: int, max_bytes: int) -> None:
    """Starts empty.

    Args:
      chunk: tokens per chunk.
      chunk_bytes: what one chunk takes.
      max_bytes: kept at most; 0 keeps nothing.
    """
    self._chunk, self._chunk_bytes = chunk, chunk_bytes
    self._max_chunks = max_bytes // chunk_bytes
    self._chunks: collections.OrderedDict[bytes, Chunk] = collections.OrderedDict()

  def __len__(self) -> int:
    return len(self._chunks)

  @property
  def num_bytes(self) -> int:
    """Bytes held."""
    return len(self._chunks) * self._chunk_bytes

  def find(self, tokens: Sequence[int]) -> list[Chunk]:
    """The longest known run of chunks from the start of `tokens`."""
    keys = self._keys(tokens)
    found = list(itertools.takewhile(lambda key: key in self._chunks, keys))
    self._touch(found)
    return [self._chunks[key] for key in found]

  def store(self, tokens: Sequence[int], read: Callable[[int], Chunk]) -> None:
    """Keeps the chunks of `tokens`; `read` is called with the number of each that is new."""
    keys = self._keys(tokens)[: self._max_chunks]
    for number, key in enumerate(keys):
      if key not in self._chunks:
        self._chunks[key] = read(number)
    self._touch(keys)
    while len(self._chunks) > self._max_chunks:
      self._chunks.popitem(last=False)

  def clear(self) -> None:
    """Forgets everything."""
    self._chunks.clear()

  def _touch(self, keys: Sequence[bytes]) -> None:
    # Last chunk first, so that no chunk outlives those that lead to it.
    for key in reversed(keys):
      self._chunks.move_to_end(key)

  def _keys(self, tokens: Sequence[int]) -> list[bytes]:
    """One key per whole chunk, each a digest of all tokens up to the chunk's end."""
    array = np.asarray(tokens, np.int32)
    digest, keys = hashlib.sha256(), []
    for start in range(0, len(array) - self._chunk + 1, self._chunk):
      digest.update(array[start : start + self._chunk].tobytes())
      keys.append(digest.digest())
    return keys
