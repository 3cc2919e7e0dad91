"""Which sequences a guarantee is about, and the ones drawn to certify it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from exitax.data import Data, Tokenizer, encode_prompt, start_id
from exitax.errors import UserError
from exitax.evaluate.calibration.config import CalibrateConfig, Draw

_FIELDS = ('prompt', 'text')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
  """Sequences drawn at random.

  Attributes:
    prompts: token ids, the start id first.
    texts: each prompt with what follows it in the held-out text; the prompt alone where nothing is known.
    population: what they were drawn from, in words.
    available: how many sequences that has.
  """

  prompts: tuple[tuple[int, ...], ...]
  texts: tuple[tuple[int, ...], ...]
  population: str
  available: int

  def __len__(self) -> int:
    return len(self.prompts)

  @property
  def digest(self) -> str:
    """SHA-256 (hex) of all token ids, in order."""
    content = json.dumps([self.prompts, self.texts]).encode()
    return hashlib.sha256(content).hexdigest()


def held_out_examples(data: Data, config: CalibrateConfig) -> Examples:
  """Stretches of held-out documents, drawn without replacement.

  Documents are cut into windows of `prompt_tokens + max_new_tokens`, the start id included, that do
  not overlap. With `Draw.WINDOWS` all of them are the population: the guarantee is about stretches of
  *these* documents, and a long document counts more. With `Draw.DOCUMENTS` it is the first window of each:
  the guarantee is about beginnings of documents, new ones included if they come from the same source.

  Raises:
    UserError: no document is long enough.
  """
  size = config.prompt_tokens + config.max_new_tokens - 1
  start = start_id(data.tokenizer)
  windows: list[np.ndarray] = []
  documents = 0
  for task in data.corpus.tasks:
    stream = task.held_out
    for begin, end in zip(stream.offsets[:-1], stream.offsets[1:], strict=True):
      content = stream.tokens[begin + 1 : end - 1]  # Without the ids that frame the document.
      count = len(content) // size
      if config.draw is Draw.DOCUMENTS:
        count = min(count, 1)
      documents += count > 0
      windows += [content[i * size : (i + 1) * size] for i in range(count)]
  if not windows:
    raise UserError(
      f'prompt_tokens={config.prompt_tokens} plus max_new_tokens={config.max_new_tokens} is longer than '
      'every held-out document: lower one of them'
    )
  names = ', '.join(task.name for task in data.corpus.tasks)
  kind = 'beginnings' if config.draw is Draw.DOCUMENTS else 'windows'
  texts = tuple(
    (start, *(int(token) for token in windows[i]))
    for i in _draw(len(windows), config.examples, config.seed)
  )
  return Examples(
    prompts=tuple(text[: config.prompt_tokens] for text in texts),
    texts=texts,
    population=(
      f'{len(windows)} {kind} of {size + 1} tokens from {documents} held-out documents of {names}'
    ),
    available=len(windows),
  )


def file_examples(
  path: str, tokenizer: Tokenizer, config: CalibrateConfig, *, max_length: int
) -> Examples:
  """Prompts of a user's own: lines of text, or JSON lines with a field `prompt` or `text`.

  Raises:
    UserError: the file cannot be read, has no prompt, or one that does not fit.
  """
  try:
    # Not splitlines(): JSON lets U+2028 and its like stand within a string.
    lines = Path(path).read_text(encoding='utf-8').split('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'--prompt_file={path} cannot be read: {error}') from None
  numbered = [(i, line) for i, line in enumerate(lines, start=1) if line.strip()]
  if not numbered:
    raise UserError(f'--prompt_file={path} has no prompt: write one a line')
  is_json = path.endswith(('.jsonl', '.json'))
  drawn = [numbered[i] for i in _draw(len(numbered), config.examples, config.seed)]
  prompts = []
  room = max_length - (config.max_new_tokens if config.metric.decodes else 0)
  for number, line in drawn:
    text = _text_of(line, f'{path}:{number}') if is_json else line
    try:
      ids = tuple(encode_prompt(tokenizer, text))
    except UserError as error:
      raise UserError(f'{path}:{number}: {error}') from None
    if len(ids) > room:
      raise UserError(
        f'{path}:{number} has {len(ids)} tokens, the context of {max_length} leaves {room}: shorten '
        'it or lower max_new_tokens'
      )
    if len(ids) < 2:
      raise UserError(f'{path}:{number} has no text: remove the line')
    prompts.append(ids)
  return Examples(
    prompts=tuple(prompts),
    texts=tuple(prompts),
    population=f'{len(numbered)} prompts of {Path(path).name}',
    available=len(numbered),
  )


def _draw(available: int, wanted: int, seed: int) -> Sequence[int]:
  order = np.random.default_rng(seed).permutation(available)
  return sorted(int(i) for i in order[:wanted])


def _text_of(line: str, name: str) -> str:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{name} is not JSON ({error}): mend or remove the line') from None
  for field in _FIELDS:
    if isinstance(record, dict) and isinstance(record.get(field), str):
      return record[field]
  raise UserError(f"{name} has no text in 'prompt' or 'text': add one, or remove the line")
