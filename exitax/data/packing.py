"""Documents packed into rows of one length, each row a slice of one long stream.

The rule, for rows of `length`:

1. A document becomes `start, its tokens, end`, the stream is all of them in order.
2. Row `i` has the inputs `stream[i * length : (i + 1) * length]`. So every id of the stream is an
   input exactly once, a long document is cut at row ends, and only the last row has padding.
3. The part of a document inside one row is a *piece*: one segment id (1, 2, ... from the left), and
   positions from 0. Nothing outside its piece may be attended to.
4. The target of an input is the next id of the same document, also where that id is the first input
   of the next row. Only the end of a document has no target: weight 0, target `pad_id`.

So every id but a document's start is predicted exactly once, and the weighted targets of a corpus
cover exactly the UTF-8 bytes of its texts (and one end id each).

Miniature, `length=4`, documents `[5, 6]` and `[7, 8, 9]`, start 1, end 2, pad 0:

  stream       1 5 6 2 | 1 7 8 9 | 2
  tokens       1 5 6 2 | 1 7 8 9 | 2 0 0 0
  targets      5 6 2 0 | 7 8 9 2 | 0 0 0 0
  segment_ids  1 1 1 1 | 1 1 1 1 | 1 0 0 0
  positions    0 1 2 3 | 0 1 2 3 | 0 0 0 0
  weights      1 1 1 0 | 1 1 1 1 | 0 0 0 0
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from exitax.data.batch import Batch, empty_row, stack_rows
from exitax.data.tokenizers import Tokenizer, start_id
from exitax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenStream:
  """The framed documents of a corpus, one after the other.

  Attributes:
    tokens: unsigned integers `[num_tokens]`, often a memory map.
    offsets: int64 `[num_documents + 1]`; document `i` is `tokens[offsets[i] : offsets[i + 1]]`.
  """

  tokens: np.ndarray
  offsets: np.ndarray


def token_stream(documents: Iterable[Sequence[int]], *, tokenizer: Tokenizer) -> TokenStream:
  """The stream of `documents`, each given as the ids of its text alone."""
  start, end = start_id(tokenizer), tokenizer.eos_id
  dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
  framed = [np.asarray([start, *ids, end], dtype) for ids in documents]
  sizes = np.array([0, *map(len, framed)], np.int64)
  return TokenStream(tokens=np.concatenate([*framed, np.zeros(0, dtype)]), offsets=np.cumsum(sizes))


class PackedRows(Sequence[Batch]):
  """The rows of a stream, made when they are asked for: a random-access source for grain."""

  def __init__(self, stream: TokenStream, *, length: int, pad_id: int) -> None:
    """Cuts `stream` into `ceil(num_tokens / length)` rows.

    Raises:
      UserError: `length` is below 1.
    """
    if length < 1:
      raise UserError(f'row length={length} is below 1: choose such as 256')
    self.stream = stream
    self.length = length
    self.pad_id = pad_id

  @property
  def padding(self) -> Batch:
    """A row `[length]` that holds nothing."""
    return empty_row(length=self.length, pad_id=self.pad_id)

  def __len__(self) -> int:
    """The number of rows."""
    return -(-len(self.stream.tokens) // self.length)

  def __getitem__(self, index: int) -> Batch:  # type: ignore[override]
    """Row `index`: arrays `[length]`."""
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f'row {index} of {len(self)}')
    begin = index * self.length
    window = np.asarray(self.stream.tokens[begin : begin + self.length + 1], np.int32)
    count = min(self.length, len(self.stream.tokens) - begin)
    place = np.arange(begin, begin + count)
    offsets = self.stream.offsets
    document = np.searchsorted(offsets, place, side='right') - 1
    has_target = place + 1 < offsets[document + 1]
    return Batch(
      tokens=self._padded(window[:count], fill=self.pad_id),
      targets=self._padded(
        np.where(has_target, np.append(window, 0)[1 : count + 1], self.pad_id), fill=self.pad_id
      ),
      segment_ids=self._padded(document - document[0] + 1, fill=0),
      positions=self._padded(place - np.maximum(offsets[document], begin), fill=0),
      weights=self._padded(has_target, fill=0).astype(np.float32),
    )

  def _padded(self, values: np.ndarray, *, fill: int) -> np.ndarray:
    row = np.full(self.length, fill, np.int32)
    row[: len(values)] = values
    return row


def pad_documents(
  documents: Sequence[Sequence[int]], *, tokenizer: Tokenizer, length: int
) -> Batch:
  """One framed document a row, padded to `[len(documents), length]`: for scoring given texts.

  Raises:
    UserError: a document with its start and end is longer than `length`.
  """
  rows = []
  for index, ids in enumerate(documents):
    if len(ids) + 2 > length:
      raise UserError(
        f'text {index} has {len(ids)} tokens, the limit is {length - 2} (length {length} with its '
        'start and end): shorten it or choose a longer length'
      )
    stream = token_stream([ids], tokenizer=tokenizer)
    rows.append(PackedRows(stream, length=length, pad_id=tokenizer.pad_id)[0])
  return stack_rows(rows)
