"""A Hugging Face folder: its configuration, and where each tensor lies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exitax.convert.safetensors_file import TensorEntry, read_header
from exitax.errors import UserError

CONFIG_FILE = 'config.json'
WEIGHTS_FILE = 'model.safetensors'
INDEX_FILE = 'model.safetensors.index.json'
SIDECAR_FILE = 'exitax_exits.safetensors'
GENERATION_FILE = 'generation_config.json'
TOKENIZER_FILE = 'tokenizer.json'
# In a model directory: the tokenizer, and what only the way back needs.
TOKENIZER_FOLDER = 'tokenizer'
ORIGIN_FOLDER = 'huggingface'
_PICKLES = ('pytorch_model.bin', 'pytorch_model.bin.index.json')
# Files beside the weights that are kept for the way back, if they are there.
CARRIED_FILES = (
  GENERATION_FILE,
  'tokenizer_config.json',
  'special_tokens_map.json',
  'chat_template.jinja',
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFaceFolder:
  """What `save_pretrained` wrote.

  Attributes:
    path: the folder.
    config: content of config.json.
    tensors: the weights by name.
  """

  path: Path
  config: Mapping[str, Any]
  tensors: Mapping[str, TensorEntry]


def open_folder(path: str | Path) -> HuggingFaceFolder:
  """Reads configuration and headers; no weights.

  Raises:
    UserError: no such folder, no safetensors in it, a shard missing or cut off.
  """
  folder = Path(path).expanduser()
  if not folder.is_dir():
    raise UserError(f'no folder {path}: give a folder that `save_pretrained` or a download wrote')
  config = read_json_object(folder / CONFIG_FILE)
  tensors: dict[str, TensorEntry] = {}
  for file in _weight_files(folder):
    for name, entry in read_header(file).items():
      if name in tensors:
        raise UserError(f'{name} is in {tensors[name].file.name} and in {file.name}: keep one')
      tensors[name] = entry
  return HuggingFaceFolder(path=folder, config=config, tensors=tensors)


def read_json_object(path: Path) -> dict[str, Any]:
  """A JSON file that holds an object.

  Raises:
    UserError: it is missing, or something else.
  """
  try:
    content = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise UserError(f'no {path.name} in {path.parent}: give a Hugging Face model folder') from None
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON ({error}): fetch it again') from None
  if not isinstance(content, dict):
    raise UserError(f'{path} is not a JSON object: fetch it again')
  return content


def _weight_files(folder: Path) -> list[Path]:
  index = folder / INDEX_FILE
  if index.is_file():
    shards = read_json_object(index).get('weight_map')
    if not isinstance(shards, dict):
      raise UserError(f'{index} has no weight_map: fetch it again')
    files = [folder / name for name in sorted(set(map(str, shards.values())))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
      raise UserError(f'{folder} lacks {", ".join(missing)}: fetch the missing shards')
    return files
  if (folder / WEIGHTS_FILE).is_file():
    return [folder / WEIGHTS_FILE]
  pickles = [name for name in _PICKLES if (folder / name).is_file()]
  if pickles:
    raise UserError(
      f'{folder} has {pickles[0]} only, a pickle, which can run code when it is read: make '
      'safetensors of it with transformers (from_pretrained, then save_pretrained) in a place of '
      'your trust'
    )
  raise UserError(f'{folder} has no {WEIGHTS_FILE} or {INDEX_FILE}: give a folder with weights')
