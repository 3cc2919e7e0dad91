"""Where documents come from: the protocol, and sources that need no package and no network.

A source is a small frozen value that lists its documents in a fixed order every time it is asked.
JSON lines are in `exitax.data.jsonl`, TensorFlow Datasets in `exitax.data.tfds_source`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from exitax.data.files import find_files, read_text, walk
from exitax.errors import UserError

_NOT_LIBRARY = frozenset({'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'})


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and the name that messages call it by (a path, or a path and a line)."""

  name: str
  text: str


class Source(Protocol):
  """Lists documents; asked twice on the same input it gives the same ones in the same order."""

  def documents(self) -> Iterator[Document]:
    """The documents of this source, in order."""
    ...


@dataclasses.dataclass(frozen=True)
class PythonLibrarySource:
  """The `.py` files of the running Python's standard library, without its tests.

  Real text on any machine with no download. It differs by patch release of Python (3.11.7: 734
  files with text in them, 12 MB, PSF licence), so results should be kept with `corpus_digest`.

  Attributes:
    max_files: take only the first so many files (sorted by path); None takes all.
  """

  max_files: int | None = None

  def documents(self) -> Iterator[Document]:
    """One document a file, named by its path below the library.

    Raises:
      UserError: this Python comes without the sources of its library.
    """
    library = Path(sysconfig.get_paths()['stdlib'])
    files = [path for path in walk(library, skip=_NOT_LIBRARY) if path.suffix == '.py']
    if not files:
      raise UserError(f'no Python library sources in {library}: name a TextSource instead')
    for path in files[: self.max_files]:
      yield Document(name=path.relative_to(library).as_posix(), text=read_text(path))


@dataclasses.dataclass(frozen=True)
class TextSource:
  """Plain UTF-8 text files.

  A long file is cut into documents at blank lines (or line ends, where a paragraph is too long),
  so that one big file still gives a held-out split.

  Attributes:
    paths: files, folders (every file below that is not hidden) or globs.
    document_bytes: UTF-8 bytes after which a document ends at the next chance; 0 never cuts.
  """

  paths: tuple[str, ...]
  document_bytes: int = 32768

  def __post_init__(self) -> None:
    """Accepts one path, or any sequence of them (gin gives lists)."""
    paths = (self.paths,) if isinstance(self.paths, str) else tuple(self.paths)
    object.__setattr__(self, 'paths', paths)

  def documents(self) -> Iterator[Document]:
    """The documents of all files; pieces of a long file are named `path#0`, `path#1`, ...

    Raises:
      UserError: a path matches nothing, or a file is not UTF-8 text (it is named).
    """
    for path in find_files(self.paths):
      pieces = cut_text(read_text(path), max_bytes=self.document_bytes)
      for index, piece in enumerate(pieces):
        yield Document(name=str(path) if len(pieces) == 1 else f'{path}#{index}', text=piece)


def cut_text(text: str, *, max_bytes: int) -> list[str]:
  """`text` in order as pieces of at most `max_bytes` UTF-8 bytes where its lines allow.

  A piece ends after a blank line if it is already half full, else at the end of a line; a single
  line longer than `max_bytes` stays whole. The pieces joined are the text. 0 means one piece.
  """
  if max_bytes <= 0 or len(text.encode()) <= max_bytes:
    return [text]
  pieces: list[str] = []
  lines: list[str] = []
  size = 0
  for line in text.splitlines(keepends=True):
    line_size = len(line.encode())
    if lines and size + line_size > max_bytes:
      pieces.append(''.join(lines))
      lines, size = [], 0
    lines.append(line)
    size += line_size
    if size >= max_bytes // 2 and not line.strip():
      pieces.append(''.join(lines))
      lines, size = [], 0
  if lines:
    pieces.append(''.join(lines))
  return pieces


def read_documents(source: Source) -> list[Document]:
  """All documents of `source` that have text, in order; blank ones are left out.

  Raises:
    UserError: nothing is left, or the source itself cannot be read.
  """
  documents = [document for document in source.documents() if document.text.strip()]
  if not documents:
    raise UserError(f'empty corpus: {source} has no text; give at least one file with text in it')
  return documents


def corpus_digest(documents: Iterable[Document]) -> str:
  """SHA-256 (hex) over the documents' texts and their order; names do not enter."""
  digest = hashlib.sha256()
  for document in documents:
    content = document.text.encode()
    digest.update(len(content).to_bytes(8, 'big'))
    digest.update(content)
  return digest.hexdigest()
