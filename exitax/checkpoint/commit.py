"""The last act of a save: flush, hash, write the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from exitax.checkpoint import digest, manifest
from exitax.checkpoint.artifacts import fsync_path
from exitax.checkpoint.folders import LOCK_NAME
from exitax.checkpoint.tree import LeafSpec

ARRAYS_FOLDER = 'arrays'


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommitPlan:
  """What the manifest will say beside the files: see `manifest.Manifest`."""

  folder: Path
  step: int
  num_processes: int
  metrics: Mapping[str, float]
  leaves: Mapping[str, LeafSpec]


def extras_name(process: int) -> str:
  """The file with one process's extras."""
  return f'extras-{process}.json'


def write_manifest(plan: CommitPlan) -> None:
  """Commits a step whose files are all written.

  The files are put on disk before the manifest is, so that not even a power failure can leave a
  manifest that promises more than there is.

  Raises:
    OSError: a file could not be read or written; the step stays unfinished.
  """
  names = [name for name in digest.list_files(plan.folder) if name != LOCK_NAME]
  for name in names:
    fsync_path(plan.folder / name)
  for folder in {(plan.folder / name).parent for name in names}:
    fsync_path(folder)
  content = manifest.Manifest(
    step=plan.step,
    num_processes=plan.num_processes,
    metrics=plan.metrics,
    leaves=plan.leaves,
    files=digest.hash_files(plan.folder, names=names),
  )
  manifest.write(plan.folder, manifest=content)
