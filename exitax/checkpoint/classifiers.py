"""Learned confidence classifiers beside a checkpoint, for its weights and no others."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exitax.checkpoint.artifacts import write_bytes_atomic
from exitax.checkpoint.certificate import checkpoint_digest
from exitax.checkpoint.errors import CheckpointError

CLASSIFIER_FILE = 'confidence.npz'
_DIGEST = 'checkpoint_digest'


def write_classifiers(
  model_dir: str | os.PathLike[str],
  classifiers: Mapping[str, Mapping[str, np.ndarray]],
  *,
  step: int,
) -> Path:
  """Writes `confidence.npz`, whole or not at all; returns its path.

  Args:
    model_dir: the model directory.
    classifiers: exit layer -> `kernel` `[embed]` and `bias` `[]`.
    step: of the checkpoint that they judge.
  """
  arrays: dict[str, Any] = {_DIGEST: np.asarray(checkpoint_digest(model_dir, step=step))}
  for layer, parts in classifiers.items():
    arrays |= {f'{layer}/{name}': np.asarray(part, np.float32) for name, part in parts.items()}
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  path = Path(model_dir) / CLASSIFIER_FILE
  write_bytes_atomic(path, buffer.getvalue())
  return path


def load_classifiers(
  model_dir: str | os.PathLike[str], *, step: int, exits: Collection[int]
) -> dict[str, dict[str, np.ndarray]] | None:
  """Classifiers of the exits after layers `exits`; None unless all are there for the weights of `step`.

  Raises:
    CheckpointError: the file cannot be read, or is damaged.
  """
  path = Path(model_dir) / CLASSIFIER_FILE
  try:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
      content = {name: arrays[name] for name in arrays.files}
  except FileNotFoundError:
    return None
  except OSError as error:
    raise CheckpointError(f'{path} cannot be read ({error.strerror}): mend it') from None
  except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
    raise CheckpointError(
      f'{path} is damaged ({error}): run `exitax tune-confidence --model_dir={model_dir}` again'
    ) from None
  if str(content.pop(_DIGEST, '')) != checkpoint_digest(model_dir, step=step):
    return None
  classifiers: dict[str, dict[str, np.ndarray]] = {}
  for name, array in content.items():
    layer, _, part = name.partition('/')
    classifiers.setdefault(layer, {})[part] = array
  if not set(map(str, exits)) <= classifiers.keys():
    return None
  return {str(layer): classifiers[str(layer)] for layer in exits}
