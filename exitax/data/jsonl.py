"""Documents from JSON lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from exitax.data.files import find_files, read_bytes
from exitax.data.sources import Document
from exitax.errors import UserError


@dataclasses.dataclass(frozen=True)
class JsonlSource:
  """One JSON object a line, its text in one field.

  Attributes:
    paths: files, folders (every `*.jsonl` below) or globs.
    field: the name of the field that holds the text.
  """

  paths: tuple[str, ...]
  field: str = 'text'

  def __post_init__(self) -> None:
    """Accepts one path, or any sequence of them (gin gives lists)."""
    paths = (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)
    object.__setattr__(self, 'paths', paths)

  def documents(self) -> Iterator[Document]:
    """One document a line, named `path:line`; blank lines are passed over.

    Raises:
      UserError: a path matches nothing, or a line is bad (named as `path:line`).
    """
    for path in find_files(self.paths, suffix='.jsonl'):
      for number, line in enumerate(read_bytes(path).split(b'\n'), start=1):
        if line.strip():
          name = f'{path}:{number}'
          yield Document(name=name, text=parse_line(line, field=self.field, name=name))


def parse_line(line: bytes, *, field: str, name: str) -> str:
  """The text in `field` of one JSON line.

  Raises:
    UserError: the line is not UTF-8, not a JSON object, or has no string in `field`.
  """
  try:
    record = json.loads(line.decode('utf-8-sig'))
  except UnicodeDecodeError as error:
    raise UserError(f'{name}: not UTF-8 (byte {error.start}); convert the file to UTF-8') from None
  except json.JSONDecodeError as error:
    raise UserError(
      f'{name}: not JSON ({error.msg} at column {error.colno}); mend or remove the line'
    ) from None
  except (ValueError, RecursionError) as error:  # Such as too many digits, or brackets.
    raise UserError(f'{name}: not readable as JSON ({error}); mend or remove the line') from None
  if not isinstance(record, dict):
    raise UserError(f'{name}: a JSON {type(record).__name__}, need an object with {field!r}')
  if field not in record:
    known = ', '.join(map(repr, record)) or 'none'
    raise UserError(f'{name}: no field {field!r} (fields: {known}); set field to one of them')
  text = record[field]
  if not isinstance(text, str):
    raise UserError(f'{name}: field {field!r} is {type(text).__name__}, need a string')
  try:
    text.encode()
  except UnicodeEncodeError:
    raise UserError(f'{name}: field {field!r} has a lone surrogate; remove the line') from None
  return text
