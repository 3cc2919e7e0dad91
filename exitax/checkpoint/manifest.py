"""The manifest: a step's commit mark, and the digests that reveal damage.

Orbax loads flipped bits silently, so every file of a step is listed with its size and SHA-256. The
manifest is the last file written: a step folder without one is unfinished. It protects itself
too: it carries the digest of its own content and must be byte for byte what `encode` writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from exitax.checkpoint import digest
from exitax.checkpoint.artifacts import write_bytes_atomic
from exitax.checkpoint.digest import FileRecord
from exitax.checkpoint.errors import CheckpointError
from exitax.checkpoint.tree import LeafSpec

MANIFEST_NAME = 'manifest.json'
FORMAT_VERSION = 1


class DamagedManifest(Exception):
  """The manifest itself is damaged; the message says how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What a finished step consists of.

  Attributes:
    step: the training step.
    num_processes: how many processes wrote it.
    metrics: metrics of the step, for best-N retention.
    leaves: shape and dtype of every leaf of the state, by path.
    files: size and digest of every file but the manifest, by name relative to the step folder.
  """

  step: int
  num_processes: int
  metrics: Mapping[str, float]
  leaves: Mapping[str, LeafSpec]
  files: Mapping[str, FileRecord]


def encode(manifest: Manifest) -> bytes:
  """The one way to write a manifest as bytes."""
  content = {'format': FORMAT_VERSION, **dataclasses.asdict(manifest)}
  return _dump({**content, 'digest': hashlib.sha256(_dump(content)).hexdigest()})


def decode(raw: bytes) -> Manifest:
  """The manifest in `raw`.

  Raises:
    DamagedManifest: any byte differs from what was written.
    CheckpointError: a newer exitax wrote it.
  """
  try:
    content = json.loads(raw)
    recorded = content.pop('digest')
    intact = recorded == hashlib.sha256(_dump(content)).hexdigest()
    intact = intact and raw == _dump({**content, 'digest': recorded})
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise DamagedManifest('cannot be parsed') from error
  if not intact:
    raise DamagedManifest('does not match its own digest')
  if content['format'] > FORMAT_VERSION:
    raise CheckpointError(
      f'the checkpoint has format {content["format"]}, this exitax reads up to {FORMAT_VERSION}: '
      'install a newer exitax'
    )
  return Manifest(
    step=content['step'],
    num_processes=content['num_processes'],
    metrics=content['metrics'],
    leaves={
      path: LeafSpec(shape=tuple(spec['shape']), dtype=spec['dtype'])
      for path, spec in content['leaves'].items()
    },
    files={name: FileRecord(**record) for name, record in content['files'].items()},
  )


def write(folder: Path, *, manifest: Manifest) -> None:
  """Commits a step: the manifest appears whole or not at all.

  Raises:
    OSError: the folder cannot be written.
  """
  write_bytes_atomic(folder / MANIFEST_NAME, encode(manifest))


def read(folder: Path) -> Manifest:
  """Reads a step's manifest.

  Raises:
    DamagedManifest: it is missing or not what was written.
    CheckpointError: a newer exitax wrote it.
  """
  try:
    raw = (folder / MANIFEST_NAME).read_bytes()
  except OSError as error:
    raise DamagedManifest(f'cannot be read ({error.strerror})') from error
  return decode(raw)


def find_damage(
  folder: Path, *, manifest: Manifest, is_needed: Callable[[str], bool], share: slice
) -> str | None:
  """The first damaged file among the needed ones, with what is wrong, or None.

  Sizes are compared first, so a truncation is found without reading anything.

  Args:
    folder: the step folder.
    manifest: what the folder should hold.
    is_needed: by file name; a partial restore leaves out what it does not read.
    share: which of the needed files to hash here (each process of a run takes its share).
  """
  needed = [name for name in sorted(manifest.files) if is_needed(name)]
  for name in needed:
    problem = _find_size_problem(folder / name, record=manifest.files[name])
    if problem:
      return f'{name} {problem}'
  try:
    found = digest.hash_files(folder, names=needed[share])
  except OSError as error:
    return f'{error.filename} cannot be read ({error.strerror})'
  for name, record in found.items():
    if record != manifest.files[name]:
      return f'{name} has sha256 {record.sha256[:12]}..., was {manifest.files[name].sha256[:12]}...'
  return None


def unlisted_files(folder: Path, *, manifest: Manifest) -> list[str]:
  """Files in the folder that the manifest does not know."""
  known: Iterable[str] = {*manifest.files, MANIFEST_NAME}
  return sorted(set(digest.list_files(folder)) - set(known))


def _find_size_problem(path: Path, *, record: FileRecord) -> str | None:
  try:
    size = path.stat().st_size
  except OSError:
    return 'is missing'
  return None if size == record.size else f'has {size} bytes, had {record.size}'


def _dump(content: Mapping[str, Any]) -> bytes:
  return (json.dumps(content, indent=1, sort_keys=True) + '\n').encode()
