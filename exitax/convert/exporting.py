"""A model as a Hugging Face folder, which plain transformers loads; exits go beside it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from exitax.checkpoint import LoadedModel
from exitax.convert.families import huggingface_config
from exitax.convert.folder import (
  CARRIED_FILES,
  CONFIG_FILE,
  ORIGIN_FOLDER,
  SIDECAR_FILE,
  TOKENIZER_FILE,
  TOKENIZER_FOLDER,
  read_json_object,
)
from exitax.convert.new_folder import new_folder
from exitax.convert.reading import ReportFn, quiet
from exitax.convert.safetensors_file import dtype_name
from exitax.convert.sidecar import sidecar_metadata
from exitax.convert.writing import SHARD_BYTES, write_backbone, write_exits
from exitax.data import HuggingFaceTokenizer, Tokenizer
from exitax.layers import merge_lora

_TORCH_NAMES = {'F64': 'float64', 'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}


def to_huggingface(
  loaded: LoadedModel,
  out: str | os.PathLike[str],
  *,
  dtype: Any = None,
  shard_bytes: int = SHARD_BYTES,
  report: ReportFn = quiet,
) -> None:
  """Writes a folder that transformers loads; exits go into a file of their own, adapters are merged.

  Args:
    loaded: the model.
    out: the folder, which must not exist or be empty.
    dtype: of all weights; None keeps each one's own.
    shard_bytes: most bytes of one file.
    report: told the bytes that have been written since it was told last.

  Raises:
    UserError: transformers has no such architecture, `out` is taken, or cannot be written.
  """
  config, name = loaded.model.config, None if dtype is None else dtype_name(dtype)
  origin = loaded.directory / ORIGIN_FOLDER / CONFIG_FILE
  stored = name or dtype_name(loaded.params['embed']['matrix'].dtype)
  if origin.is_file():
    content = {**read_json_object(origin), 'dtype': _TORCH_NAMES[stored]}
    content.pop('torch_dtype', None)
    content['max_position_embeddings'] = config.max_length
  else:
    content = huggingface_config(config, dtype=_TORCH_NAMES[stored])
    content |= _special_ids(loaded.tokenizer)
  params = merge_lora(loaded.params, config.lora)
  with new_folder(out) as folder:
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + '\n')
    _write_tokenizer(loaded, folder)
    write_backbone(folder, config, params, dtype=name, shard_bytes=shard_bytes, report=report)
    if config.exits:
      write_exits(
        folder / SIDECAR_FILE,
        config,
        params,
        metadata=sidecar_metadata(config.exits),
        dtype=name,
        report=report,
      )


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
  return {
    'bos_token_id': tokenizer.bos_id,
    'eos_token_id': tokenizer.eos_id,
    'pad_token_id': tokenizer.pad_id,
  }


def _write_tokenizer(loaded: LoadedModel, folder: Path) -> None:
  """tokenizer.json and what transformers wants beside it; a byte tokenizer has neither."""
  own = loaded.directory / TOKENIZER_FOLDER
  if (own / TOKENIZER_FILE).is_file():
    assert isinstance(loaded.tokenizer, HuggingFaceTokenizer)
    (folder / TOKENIZER_FILE).write_text(loaded.tokenizer.as_file(), encoding='utf-8')
    names = {
      f'{kind}_token': _token_text(own / TOKENIZER_FILE, index)
      for kind, index in (
        ('bos', loaded.tokenizer.bos_id),
        ('eos', loaded.tokenizer.eos_id),
        ('pad', loaded.tokenizer.pad_id),
      )
      if index is not None
    }
    if not (own / 'tokenizer_config.json').is_file():
      content = {'tokenizer_class': 'PreTrainedTokenizerFast', **names}
      (folder / 'tokenizer_config.json').write_text(json.dumps(content, indent=2) + '\n')
  for name in CARRIED_FILES:
    for place in (own, loaded.directory / ORIGIN_FOLDER):
      if (place / name).is_file():
        shutil.copyfile(place / name, folder / name)


def _token_text(path: Path, index: int) -> str | None:
  """The text of a special id in a tokenizer.json."""
  content = read_json_object(path)
  for token in content.get('added_tokens', ()):
    if token['id'] == index:
      return token['content']
  vocabulary = content.get('model', {}).get('vocab', {})
  return next((text for text, i in vocabulary.items() if i == index), None)
