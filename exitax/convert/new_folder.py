"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from exitax.errors import UserError


@contextlib.contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
  """A folder that becomes `out` if all goes well, and goes away if not.

  Raises:
    UserError: `out` is taken, or cannot be written.
  """
  target = Path(out).expanduser()
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f'{out} exists and is not an empty folder: choose another')
  partial = target.parent / f'.{target.name}.{uuid.uuid4().hex}.partial'
  try:
    partial.mkdir(parents=True)
    yield partial
    os.replace(partial, target)
  except OSError as error:
    raise UserError(
      f'{out} cannot be written ({error.strerror or error}): nothing is left of it'
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)
