"""Tokenizers of the Hugging Face `tokenizers` library: BPE trained here, and any `tokenizer.json`.

The library is imported when a tokenizer is made, not when this file is.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from exitax.data.files import read_bytes
from exitax.data.progress import Progress, quiet
from exitax.data.tokenizers import TOKENIZER_FILE, utf8, write_info
from exitax.errors import UserError

_PAD, _BOS, _EOS = '<|pad|>', '<|bos|>', '<|eos|>'
_SPECIALS = (_PAD, _BOS, _EOS)
_MIN_VOCAB = 256 + len(_SPECIALS)

# Tried in this order where nothing beside the file names them.
_KNOWN_EOS = ('<|end_of_text|>', '<|endoftext|>', '</s>', '<eos>', '<|eos|>', '<|im_end|>')
_KNOWN_BOS = ('<|begin_of_text|>', '<s>', '<bos>', '<|bos|>')
_KNOWN_PAD = ('<|finetune_right_pad_id|>', '<pad>', '<|pad|>', '[PAD]')


class HuggingFaceTokenizer:
  """Any `tokenizer.json`, with the ids of its special tokens.

  Special tokens written in a text are parsed, as the library does by default and chat templates
  need; `BpeTokenizer` takes them as plain text.
  """

  kind = 'huggingface'
  parses_specials = True

  def __init__(
    self,
    definition: str,
    *,
    eos_id: int,
    bos_id: int | None = None,
    pad_id: int | None = None,
    prompt_ids: Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
  ) -> None:
    """Takes the content of a `tokenizer.json`.

    `prompt_ids` None is the start of the documents that models are trained on here, `stop_ids` None
    is `eos_id` alone.

    Raises:
      UserError: the library is missing, or `definition` is not a tokenizer.
    """
    library = _import_tokenizers()
    try:
      self._tokenizer = library.Tokenizer.from_str(definition)
    except Exception as error:  # The library raises bare Exception.
      raise UserError(f'not a tokenizer.json ({error}): give one written by tokenizers') from None
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self._tokenizer.encode_special_tokens = not self.parses_specials
    # Kept as it came: what is saved, and its digest, do not change with the library's version.
    self._definition = definition
    self.bos_id = bos_id
    self.eos_id = eos_id
    self.pad_id = eos_id if pad_id is None else pad_id
    self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
    start = (eos_id if bos_id is None else bos_id,)
    self.prompt_ids = start if prompt_ids is None else tuple(prompt_ids)
    self.stop_ids = (eos_id,) if stop_ids is None else tuple(stop_ids)
    identity = [definition, self.bos_id, self.eos_id, self.pad_id, self.parses_specials]
    if (self.prompt_ids, self.stop_ids) != (start, (eos_id,)):
      identity += [self.prompt_ids, self.stop_ids]
    self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

  @classmethod
  def from_file(cls, path: str | Path, *, eos_token: str | None = None) -> Self:
    """The tokenizer in the file `path`.

    The special tokens come from `tokenizer_config.json` or `special_tokens_map.json` beside it,
    else from well-known names in its vocabulary; `eos_token` overrides the end.

    Raises:
      UserError: there is no such file, it is no tokenizer, or no end token is found.
    """
    path = Path(path)
    if not path.is_file():
      raise UserError(f'no tokenizer at {path}: give a tokenizer.json or a folder that has one')
    definition = _decode(read_bytes(path), path=path)
    try:
      vocabulary = _import_tokenizers().Tokenizer.from_str(definition).get_vocab(True)
    except Exception as error:
      raise UserError(f'{path} is not a tokenizer.json ({error}): give another file') from None
    named = _named_specials(path.parent)
    eos = _find(vocabulary, [eos_token] if eos_token else [named.get('eos_token'), *_KNOWN_EOS])
    if eos is None:
      raise UserError(
        f'{path} has no end token {eos_token!r}: pass eos_token=, one of its vocabulary'
        if eos_token
        else f'{path} names no end token (tried {", ".join(_KNOWN_EOS)}): pass eos_token='
      )
    return cls(
      definition,
      eos_id=eos,
      bos_id=_find(vocabulary, [named.get('bos_token'), *_KNOWN_BOS]),
      pad_id=_find(vocabulary, [named.get('pad_token'), *_KNOWN_PAD]),
    )

  def for_trained_model(self, *, stop_ids: Sequence[int] = ()) -> HuggingFaceTokenizer:
    """The same for a model that was trained elsewhere: prompts begin as its own template says.

    `stop_ids` join `eos_id`.
    """
    encoding = self._tokenizer.encode('', add_special_tokens=True)
    # Templates that end texts too end them with `eos_id`, which a prompt does not want.
    prompt_ids = encoding.ids
    while prompt_ids and prompt_ids[-1] == self.eos_id != self.bos_id:
      prompt_ids = prompt_ids[:-1]
    return HuggingFaceTokenizer(
      self._definition,
      eos_id=self.eos_id,
      bos_id=self.bos_id,
      pad_id=self.pad_id,
      prompt_ids=prompt_ids,
      stop_ids=tuple(dict.fromkeys([self.eos_id, *stop_ids])),
    )

  def as_file(self) -> str:
    """A `tokenizer.json` that puts `prompt_ids` in front of a text for other libraries too.

    As it came, where it does so already; else with a template that does.
    """
    if self._tokenizer.encode('', add_special_tokens=True).ids == list(self.prompt_ids):
      return self._definition
    library = _import_tokenizers()
    copy = library.Tokenizer.from_str(self._definition)
    start = [copy.id_to_token(index) for index in self.prompt_ids]
    copy.post_processor = library.processors.TemplateProcessing(
      single=' '.join([*start, '$A']),
      special_tokens=list(zip(start, self.prompt_ids, strict=True)),
    )
    return copy.to_str(pretty=True)

  def encode(self, text: str) -> list[int]:
    """The ids of `text`. Raises UserError for a lone surrogate."""
    utf8(text)
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of each text, on all cores."""
    for text in texts:
      utf8(text)
    encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; special ids, and ids outside the vocabulary, give nothing."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  def save(self, directory: str | Path) -> None:
    """Writes the folder that `load_tokenizer` reads."""
    write_info(directory, kind=self.kind, tokenizer=self)
    (Path(directory) / TOKENIZER_FILE).write_bytes(self._definition.encode())


class BpeTokenizer(HuggingFaceTokenizer):
  """Byte-level BPE trained on a corpus: `decode(encode(text)) == text` for every text.

  Pad, begin and end are ids 0, 1 and 2. Written in a text they are plain text.
  """

  kind = 'bpe'
  parses_specials = False

  @classmethod
  def train(
    cls,
    texts: Iterable[str],
    *,
    vocab_size: int,
    total: int = 0,
    progress: Progress = quiet,
  ) -> Self:
    """Learns merges from `texts` (`total` of them) until there are `vocab_size` ids.

    A corpus with too few pairs to merge gives fewer ids: read `vocab_size` of the result.

    Raises:
      UserError: `vocab_size` is below 259, or the library is missing.
    """
    if vocab_size < _MIN_VOCAB:
      raise UserError(
        f'vocab_size={vocab_size} is below {_MIN_VOCAB} (256 bytes and {len(_SPECIALS)} special '
        'tokens): choose more, such as 4096, or the byte tokenizer'
      )
    library = _import_tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=list(_SPECIALS),
      initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    )
    items = progress(texts, total=total, label='training the tokenizer')
    tokenizer.train_from_iterator(items, trainer=trainer)
    ids = {token: index for index, token in enumerate(_SPECIALS)}
    return cls(tokenizer.to_str(), eos_id=ids[_EOS], bos_id=ids[_BOS], pad_id=ids[_PAD])


def load_saved(folder: Path, *, info: dict[str, Any], kind: str) -> HuggingFaceTokenizer:
  """The tokenizer that `save` wrote into `folder`.

  Raises:
    UserError: its `tokenizer.json` is missing or damaged.
  """
  path = folder / TOKENIZER_FILE
  cls = BpeTokenizer if kind == 'bpe' else HuggingFaceTokenizer
  try:
    return cls(
      _decode(read_bytes(path), path=path),
      eos_id=info['eos_id'],
      bos_id=info['bos_id'],
      pad_id=info['pad_id'],
      prompt_ids=info.get('prompt_ids'),
      stop_ids=info.get('stop_ids'),
    )
  except KeyError as error:
    raise UserError(f'tokenizer in {folder} is damaged: no {error}; restore the folder') from None


def _decode(content: bytes, *, path: Path) -> str:
  try:
    return content.decode()
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not a tokenizer.json: byte {error.start} is not UTF-8') from None


def _named_specials(folder: Path) -> dict[str, str]:
  """`eos_token` and its like from the files that transformers writes beside a tokenizer."""
  named: dict[str, str] = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    path = folder / name
    if not path.is_file():
      continue
    try:
      values = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
      raise UserError(f'{path} is not JSON ({error}): mend or remove it') from None
    if not isinstance(values, dict):
      raise UserError(f'{path} is not a JSON object: mend or remove it')
    for key in ('bos_token', 'eos_token', 'pad_token'):
      value = values.get(key)
      content = value.get('content') if isinstance(value, dict) else value
      if isinstance(content, str):
        named[key] = content
  return named


def _find(vocabulary: dict[str, int], tokens: Sequence[str | None]) -> int | None:
  return next((vocabulary[token] for token in tokens if token in vocabulary), None)


def _import_tokenizers() -> Any:
  try:
    return importlib.import_module('tokenizers')
  except ImportError:
    raise UserError('this tokenizer needs the tokenizers package: pip install tokenizers') from None
