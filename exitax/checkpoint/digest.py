"""SHA-256 of many files at once."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from concurrent import futures
from pathlib import Path

# Large enough to leave the interpreter rarely, small enough to stay in the second-level cache.
CHUNK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class FileRecord:
  """A file's content in brief.

  Attributes:
    size: bytes.
    sha256: lower-case hexadecimal digest of the content.
  """

  size: int
  sha256: str


def hash_file(path: Path) -> FileRecord:
  """Size and SHA-256 of one file.

  Raises:
    OSError: the file is missing or cannot be read.
  """
  digest = hashlib.sha256()
  buffer = memoryview(bytearray(CHUNK_BYTES))
  size = 0
  with open(path, 'rb', buffering=0) as file:
    while count := file.readinto(buffer):
      digest.update(buffer[:count])
      size += count
  return FileRecord(size=size, sha256=digest.hexdigest())


def hash_files(root: Path, *, names: Iterable[str]) -> dict[str, FileRecord]:
  """Records of files named relative to `root`; hashlib drops the GIL, so threads run in parallel.

  Raises:
    OSError: a file is missing or cannot be read.
  """
  names = list(names)
  with futures.ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
    records = pool.map(hash_file, [root / name for name in names])
    return dict(zip(names, records, strict=True))


def list_files(root: Path) -> list[str]:
  """All files below `root`, as sorted `/`-separated names relative to it."""
  return sorted(path.relative_to(root).as_posix() for path in root.rglob('*') if path.is_file())
