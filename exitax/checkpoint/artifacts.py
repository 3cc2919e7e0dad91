"""Small files of a model directory: written whole or not at all, read with a clear complaint.

`MODEL_DIR/checkpoints/<step>/...` holds the checkpoints; JSON files such as `MODEL_DIR/model.json`
lie beside that folder.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

from exitax.checkpoint.errors import CheckpointError

CHECKPOINTS_FOLDER = 'checkpoints'


def checkpoints_directory(model_dir: str | os.PathLike[str]) -> Path:
  """The folder of a model directory that holds its checkpoints, one folder per step."""
  return Path(model_dir) / CHECKPOINTS_FOLDER


def fsync_path(path: Path) -> None:
  """Asks the operating system to put a file or a folder's entries on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def write_bytes_atomic(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a file so that every reader sees the old content or the new, never a part.

  The folder is created when absent. The bytes reach the disk before the name does, so a power
  failure cannot leave a name without its content.

  Raises:
    OSError: the folder is not writable or the disk is full; the old file is then untouched.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f'.{path.name}.{uuid.uuid4().hex}'
  try:
    with open(temporary, 'xb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  fsync_path(path.parent)


def write_json_atomic(path: str | os.PathLike[str], value: Any) -> None:
  """Writes JSON-able data (sorted keys, indented, UTF-8) atomically: see `write_bytes_atomic`.

  Raises:
    TypeError: `value` holds something that JSON cannot; nothing has been written then.
    OSError: as for `write_bytes_atomic`.
  """
  text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + '\n'
  write_bytes_atomic(path, text.encode())


def read_json(path: str | os.PathLike[str]) -> Any:
  """Reads a JSON file.

  Raises:
    CheckpointError: the file is missing, unreadable, or not JSON.
  """
  path = Path(path)
  try:
    return json.loads(path.read_bytes())
  except FileNotFoundError:
    raise CheckpointError(
      f'{path} does not exist: name the model directory that training wrote, or train one first'
    ) from None
  except OSError as error:
    raise CheckpointError(
      f'{path} cannot be read ({error.strerror}): mend its permissions or path'
    ) from error
  except (ValueError, RecursionError) as error:
    raise CheckpointError(
      f'{path} is not valid JSON ({error}): restore the file from a copy, or train again'
    ) from error
