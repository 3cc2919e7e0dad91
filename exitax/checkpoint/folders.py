"""Step folders on disk: which are finished, which are being written, which are remains.

<root>/30/manifest.json   finished (the manifest is the commit mark)
<root>/40/writer.lock     being written while some process holds the lock, otherwise remains
<root>/30.replaced/       the finished step 30, set aside while step 30 is written once more
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
from pathlib import Path

from exitax.checkpoint.errors import CheckpointError
from exitax.checkpoint.manifest import MANIFEST_NAME

LOCK_NAME = 'writer.lock'
REPLACED_SUFFIX = '.replaced'

_logger = logging.getLogger('exitax.checkpoint')


class WriterLock:
  """Marks a step folder as being written; the system releases it when the process dies."""

  def __init__(self, folder: Path) -> None:
    self._path = folder / LOCK_NAME
    self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
    # The folder is fresh, so only a reader's momentary probe can be in the way: wait for it.
    fcntl.flock(self._descriptor, fcntl.LOCK_EX)
    os.write(self._descriptor, f'{socket.gethostname()} {os.getpid()}\n'.encode())

  def finish(self) -> None:
    """Removes the mark: the step is complete."""
    self._path.unlink(missing_ok=True)
    self.abandon()

  def abandon(self) -> None:
    """Gives the lock up and leaves its file behind, in a folder that stays unfinished."""
    os.close(self._descriptor)


class StepFolders:
  """The folders of one checkpoints directory."""

  def __init__(self, root: Path) -> None:
    self.root = root
    self._noticed: set[str] = set()

  def path(self, step: int) -> Path:
    """Where step `step` is written."""
    return self.root / str(step)

  def finished(self) -> dict[int, Path]:
    """Finished steps in ascending order, with their folders."""
    found = {int(p.name): p for p in self._numbered('') if _is_finished(p)}
    for aside in self._numbered(REPLACED_SUFFIX):
      step = int(aside.name.removesuffix(REPLACED_SUFFIX))
      if step not in found and _is_finished(aside):
        found[step] = aside
    return dict(sorted(found.items()))

  def notice_unfinished(self) -> None:
    """Logs one line for every unfinished step that nobody is writing, once each."""
    for folder in self._numbered(''):
      if folder.name not in self._noticed and _is_remains(folder):
        self._noticed.add(folder.name)
        _logger.warning(
          'ignoring unfinished checkpoint %s: its save was cut short; the next save removes it',
          folder,
        )

  def begin(self, step: int) -> WriterLock:
    """Makes an empty, locked folder for a step; a finished one of that step is set aside first.

    Raises:
      CheckpointError: another process is writing the same step.
      OSError: the directory is not writable.
    """
    folder = self.path(step)
    self.root.mkdir(parents=True, exist_ok=True)
    if _is_finished(folder):
      aside = folder.with_name(folder.name + REPLACED_SUFFIX)
      _remove(aside)
      folder.rename(aside)
    elif folder.exists():
      if is_being_written(folder):
        raise CheckpointError(
          f'{folder} is being written by {_describe_writer(folder)}: '
          'stop that run or choose another model directory'
        )
      _remove(folder)
    folder.mkdir()
    return WriterLock(folder)

  def remove(self, step: int) -> None:
    """Removes a finished step."""
    _remove(self.path(step))
    _remove(self.path(step).with_name(f'{step}{REPLACED_SUFFIX}'))

  def clean(self) -> None:
    """Removes remains of saves that were cut short, and puts back what they had set aside."""
    for folder in self._numbered(''):
      if _is_remains(folder):
        _logger.info('removing unfinished checkpoint %s', folder)
        _remove(folder)
    for aside in self._numbered(REPLACED_SUFFIX):
      folder = aside.with_name(aside.name.removesuffix(REPLACED_SUFFIX))
      if _is_finished(folder):
        _remove(aside)
      elif not folder.exists():
        aside.rename(folder)

  def _numbered(self, suffix: str) -> list[Path]:
    if not self.root.is_dir():
      return []
    return sorted(
      path
      for path in self.root.iterdir()
      if path.name.endswith(suffix) and path.name.removesuffix(suffix).isdecimal() and path.is_dir()
    )


def is_being_written(folder: Path) -> bool:
  """Whether a living process holds the folder's lock."""
  try:
    descriptor = os.open(folder / LOCK_NAME, os.O_RDONLY)
  except FileNotFoundError:
    return False
  try:
    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except OSError:
    return True
  finally:
    os.close(descriptor)
  return False


def _is_finished(folder: Path) -> bool:
  return (folder / MANIFEST_NAME).is_file()


def _is_remains(folder: Path) -> bool:
  # The order matters: a writer that commits in between leaves a manifest behind.
  return not is_being_written(folder) and not _is_finished(folder) and folder.is_dir()


def _describe_writer(folder: Path) -> str:
  try:
    host, process = (folder / LOCK_NAME).read_text().split()
  except (OSError, ValueError):
    return 'another process'
  return f'process {process} on {host}'


def _remove(folder: Path) -> None:
  # Without its manifest a half-removed step counts as unfinished, not as damaged.
  (folder / MANIFEST_NAME).unlink(missing_ok=True)
  shutil.rmtree(folder, ignore_errors=True)
