"""Finding files that a user named, and reading them as text."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from exitax.errors import UserError


def find_files(patterns: Sequence[str], *, suffix: str = '') -> list[Path]:
  """The files that `patterns` name, each once, in an order that does not depend on the machine.

  A pattern is a file, a folder (all files below it whose name ends in `suffix`, hidden ones left
  out) or a glob (`**` descends). Patterns keep their order; files inside one are sorted.

  Raises:
    UserError: a pattern matches no file.
  """
  found: dict[Path, None] = {}
  for pattern in patterns:
    path = Path(pattern).expanduser()
    if path.is_dir():
      files = [file for file in walk(path) if file.name.endswith(suffix)]
    elif path.is_file():
      files = [path]
    else:
      matches = sorted(glob.glob(str(path), recursive=True))
      files = [Path(match) for match in matches if os.path.isfile(match)]
    if not files:
      kind = f'*{suffix} file' if suffix else 'file'
      raise UserError(f'no {kind} at {pattern!r}: give an existing file, folder or glob')
    found.update(dict.fromkeys(files))
  return list(found)


def walk(folder: Path, *, skip: frozenset[str] = frozenset()) -> list[Path]:
  """Files below `folder` sorted by relative path, without hidden ones and folders in `skip`."""
  paths = []
  for parent, folders, names in os.walk(folder):
    folders[:] = [name for name in folders if not name.startswith('.') and name not in skip]
    paths += [Path(parent, name) for name in names if not name.startswith('.')]
  return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())


def read_bytes(path: Path) -> bytes:
  """The content of `path`.

  Raises:
    UserError: the file cannot be opened.
  """
  try:
    return path.read_bytes()
  except OSError as error:
    raise UserError(
      f'cannot read {path}: {error.strerror}; check the path and its rights'
    ) from None


def read_text(path: Path) -> str:
  """The UTF-8 text of `path`, without a byte order mark.

  Raises:
    UserError: the file cannot be opened, is not UTF-8, or holds a NUL byte.
  """
  content = read_bytes(path)
  fix = 'convert it to UTF-8 or leave it out, for example with a glob such as folder/**/*.txt'
  nul = content.find(b'\0')
  if nul >= 0:
    raise UserError(f'{path} is not text: it has a NUL byte at {nul}; {fix}')
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8 text: bad byte at {error.start}; {fix}') from None
