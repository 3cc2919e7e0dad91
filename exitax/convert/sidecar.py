"""Exits beside a Hugging Face model: a file that transformers does not see.

`exitax_exits.safetensors` has the exits' leaves under their paths, and in its metadata where the
exits are. Who knows exitax gets the exits with the backbone, and everybody else the backbone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exitax.convert.folder import SIDECAR_FILE
from exitax.convert.safetensors_file import TensorEntry, read_header, read_metadata
from exitax.errors import UserError
from exitax.models import ExitConfig, ModelConfig

_FORMAT = 1


def sidecar_metadata(exits: tuple[ExitConfig, ...]) -> dict[str, str]:
  """Metadata of the file: a JSON object under `exitax`."""
  items = [
    {'layer': item.layer, 'head': item.head.value, 'matrix': item.matrix.value} for item in exits
  ]
  return {'format': 'exitax', 'exitax': json.dumps({'format': _FORMAT, 'exits': items})}


def with_exits(config: ModelConfig, folder: Path) -> tuple[ModelConfig, Mapping[str, TensorEntry]]:
  """The model with the exits of the folder's sidecar, if it has one, and their tensors.

  Raises:
    UserError: the file is damaged, or its exits do not fit the model.
  """
  path = folder / SIDECAR_FILE
  if not path.is_file():
    return config, {}
  tensors = read_header(path)
  try:
    content: Any = json.loads(read_metadata(path)['exitax'])
    exits = tuple(ExitConfig(**item) for item in content['exits'])
    known = content['format'] == _FORMAT
  except (KeyError, TypeError, ValueError, RecursionError) as error:
    raise UserError(f'{path} does not say where its exits are ({error}): convert again') from None
  if not known:
    raise UserError(
      f'{path} has format {content["format"]}, this exitax reads {_FORMAT}: install a newer one'
    )
  return dataclasses.replace(config, exits=exits), tensors
