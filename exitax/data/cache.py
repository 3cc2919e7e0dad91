"""A cache of folders on disk: each made once, whole or not at all, and checked when it is used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exitax.errors import UserError

CACHE_VARIABLE = 'EXITAX_CACHE_DIR'
_MANIFEST = 'manifest.json'


def cache_root(directory: str | None = None) -> Path:
  """Where cached folders live: `directory`, else $EXITAX_CACHE_DIR, else `~/.cache/exitax`."""
  return Path(directory or os.environ.get(CACHE_VARIABLE) or '~/.cache/exitax').expanduser()


def key_of(parts: Mapping[str, Any]) -> str:
  """A SHA-256 (hex) of JSON-able `parts`, whatever their order."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached_folder(path: Path, *, write_fn: Callable[[Path], None]) -> Path:
  """`path`, made by `write_fn` unless it is there and its files match their digests.

  The folder is written beside its place and renamed, so a killed process leaves nothing that looks
  whole; a damaged folder is made anew; two processes may make it at once.

  Raises:
    UserError: the cache cannot be written.
  """
  if is_whole(path):
    return path
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f'.{path.name[:16]}-', dir=path.parent))
  except OSError as error:
    raise UserError(
      f'cannot write the cache {path.parent}: {error.strerror}; '
      f'set {CACHE_VARIABLE} or cache_dir to a folder that can be written'
    ) from None
  try:
    write_fn(draft)
    _write_manifest(draft)
    _move(draft, path)
  except OSError as error:
    raise UserError(f'cannot write the cache {path}: {error.strerror}; free some space') from error
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  return path


def is_whole(path: Path) -> bool:
  """Whether the folder has a manifest and every file has the digest that it records."""
  try:
    manifest = json.loads((path / _MANIFEST).read_bytes())
    return all(file_digest(path / name) == digest for name, digest in manifest.items())
  except (OSError, ValueError, AttributeError):
    return False


def file_digest(path: Path) -> str:
  """SHA-256 (hex) of a file."""
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _write_manifest(folder: Path) -> None:
  digests = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
  (folder / _MANIFEST).write_text(json.dumps(digests, indent=2) + '\n')


def _move(draft: Path, path: Path) -> None:
  if path.exists() and not is_whole(path):
    shutil.rmtree(path, ignore_errors=True)
  try:
    os.rename(draft, path)
  except OSError:
    if not is_whole(path):  # Not another process that was faster: a real failure.
      raise
