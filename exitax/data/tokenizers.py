"""Tokenizers: the protocol, bytes, and keeping a tokenizer beside a checkpoint.

A saved tokenizer is a folder with `exitax_tokenizer.json` (kind, special ids, digest) and, for all
kinds but bytes, the `tokenizer.json` of the Hugging Face `tokenizers` library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from exitax.data.files import read_bytes
from exitax.errors import UserError

INFO_FILE = 'exitax_tokenizer.json'
TOKENIZER_FILE = 'tokenizer.json'


class Tokenizer(Protocol):
  """Text to token ids and back. Neither direction adds or shows special tokens.

  Attributes:
    vocab_size: one more than the highest id.
    eos_id: ends a document.
    bos_id: begins a document; None where the tokenizer has none (see `start_id`).
    pad_id: fills rows; has no meaning and no weight.
    prompt_ids: begin a prompt; empty for models that were trained without a start.
    stop_ids: end an answer: `eos_id`, and others that a chat model may end its turns with.
    digest: SHA-256 (hex) of all that decides what `encode` and `decode` give.
  """

  @property
  def vocab_size(self) -> int: ...

  @property
  def eos_id(self) -> int: ...

  @property
  def bos_id(self) -> int | None: ...

  @property
  def pad_id(self) -> int: ...

  @property
  def prompt_ids(self) -> tuple[int, ...]: ...

  @property
  def stop_ids(self) -> tuple[int, ...]: ...

  @property
  def digest(self) -> str: ...

  def encode(self, text: str) -> list[int]:
    """The ids of `text`."""
    ...

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, in parallel where the tokenizer can."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; special ids give nothing, broken UTF-8 gives U+FFFD."""
    ...

  def save(self, directory: str | Path) -> None:
    """Writes the folder that `load_tokenizer` reads."""
    ...


class ByteTokenizer:
  """UTF-8 bytes as ids 0 to 255, then begin 256, end 257 and pad 258.

  The vocabulary has 264 ids, five of them unused, so that 2, 4 or 8 devices divide it.
  """

  vocab_size = 264
  bos_id = 256
  eos_id = 257
  pad_id = 258
  prompt_ids = (256,)
  stop_ids = (257,)
  digest = hashlib.sha256(b'exitax bytes 1').hexdigest()

  def encode(self, text: str) -> list[int]:
    """The UTF-8 bytes of `text`. Raises UserError for a lone surrogate."""
    return list(utf8(text))

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of the ids below 256."""
    return bytes(int(i) for i in ids if i < 256).decode('utf-8', errors='replace')

  def save(self, directory: str | Path) -> None:
    """Writes the folder that `load_tokenizer` reads."""
    write_info(directory, kind='bytes', tokenizer=self)


def utf8(text: str) -> bytes:
  """`text` as UTF-8.

  Raises:
    UserError: it holds a lone surrogate, as an argument that is not UTF-8 does.
  """
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    bad = text[error.start]
    raise UserError(
      f'text has {bad!r} at {error.start}, which is no character: remove it'
    ) from None


def start_id(tokenizer: Tokenizer) -> int:
  """The id that every document of a training text begins with.

  It is `bos_id`, or `eos_id` for tokenizers without one (as GPT-2 separates its documents), so
  that the first token of a text is predicted too, and text can be generated from no prompt.
  """
  return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
  """The ids of a prompt as the model saw them, without an end; at least one."""
  return begin_prompt(tokenizer, tokenizer.encode(text))


def begin_prompt(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
  """`ids` behind `prompt_ids`, unless they begin so already, as chat templates let them."""
  start = list(tokenizer.prompt_ids)
  prompt = list(ids) if list(ids[: len(start)]) == start else [*start, *ids]
  return prompt or [start_id(tokenizer)]


def write_info(directory: str | Path, *, kind: str, tokenizer: Tokenizer) -> None:
  """Writes `exitax_tokenizer.json` into `directory`, making the folder."""
  info = {
    'kind': kind,
    'digest': tokenizer.digest,
    'vocab_size': tokenizer.vocab_size,
    'bos_id': tokenizer.bos_id,
    'eos_id': tokenizer.eos_id,
    'pad_id': tokenizer.pad_id,
    'prompt_ids': list(tokenizer.prompt_ids),
    'stop_ids': list(tokenizer.stop_ids),
  }
  folder = Path(directory)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + '\n')


def load_tokenizer(path: str | Path) -> Tokenizer:
  """The tokenizer in a folder written by `save`, or in any Hugging Face `tokenizer.json`.

  Raises:
    UserError: nothing is there, it cannot be read, or it was changed since it was saved.
  """
  from exitax.data import huggingface  # Late: it needs the `tokenizers` package.

  path = Path(path).expanduser()
  folder = path if path.is_dir() else path.parent
  if not (folder / INFO_FILE).is_file():
    return huggingface.HuggingFaceTokenizer.from_file(
      path / TOKENIZER_FILE if path.is_dir() else path
    )
  info = _read_info(folder / INFO_FILE)
  match info.get('kind'):
    case 'bytes':
      tokenizer: Tokenizer = ByteTokenizer()
    case 'bpe' | 'huggingface' as kind:
      tokenizer = huggingface.load_saved(folder, info=info, kind=kind)
    case kind:
      raise UserError(f'{folder / INFO_FILE}: unknown kind {kind!r}: bytes, bpe or huggingface')
  if tokenizer.digest != info.get('digest'):
    raise UserError(
      f'tokenizer in {folder} was changed since it was saved (digest {tokenizer.digest[:12]}, '
      f'recorded {str(info.get("digest"))[:12]}): restore the folder from its checkpoint'
    )
  return tokenizer


def check_tokenizer(tokenizer: Tokenizer, *, expected_digest: str, where: str = '') -> None:
  """Makes sure that `tokenizer` is the one that a checkpoint (`where`) was trained with.

  Raises:
    UserError: the digests differ.
  """
  if tokenizer.digest != expected_digest:
    raise UserError(
      f'tokenizer {tokenizer.digest[:12]} (vocabulary of {tokenizer.vocab_size}) does not match '
      f'checkpoint {where or "with tokenizer"} {expected_digest[:12]}: use the tokenizer saved with '
      'the checkpoint, or another model directory'
    )


def _read_info(path: Path) -> dict[str, Any]:
  try:
    info = json.loads(read_bytes(path))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is damaged ({error}): restore it from its checkpoint') from None
  if not isinstance(info, dict):
    raise UserError(f'{path} is damaged (not an object): restore it from its checkpoint')
  return info
