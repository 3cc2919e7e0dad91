"""A Hugging Face folder as a model: on a mesh, or as a model directory."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from exitax.checkpoint import LoadedModel, write_json_atomic, write_sampling
from exitax.convert.families import model_config, source_precision, with_length
from exitax.convert.folder import (
  CARRIED_FILES,
  CONFIG_FILE,
  GENERATION_FILE,
  ORIGIN_FOLDER,
  TOKENIZER_FILE,
  TOKENIZER_FOLDER,
  HuggingFaceFolder,
  open_folder,
  read_json_object,
)
from exitax.convert.new_folder import new_folder
from exitax.convert.reading import ReportFn, check_tensors, lazy_params, quiet, read_params
from exitax.convert.safetensors_file import TensorEntry
from exitax.convert.saving import write_model_dir
from exitax.convert.sidecar import with_exits
from exitax.data import HuggingFaceTokenizer, Tokenizer
from exitax.errors import UserError
from exitax.layers import Precision
from exitax.models import ExitLM, ModelConfig
from exitax.parallel import ShardingRules

# A vocabulary may be padded to suit devices, but not by more than this part of it.
_MAX_PADDING = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A Hugging Face folder that has been looked through and fits.

  Attributes:
    folder: the folder.
    config: the model, exits of a sidecar included.
    tensors: all weights by name.
    tokenizer: its tokenizer.
    num_bytes: of all weights.
  """

  folder: HuggingFaceFolder
  config: ModelConfig
  tensors: Mapping[str, TensorEntry]
  tokenizer: Tokenizer
  num_bytes: int


def open_source(
  path: str | os.PathLike[str],
  *,
  tokenizer: str | os.PathLike[str] | None = None,
  max_length: int | None = None,
  precision: Precision | None = None,
) -> Source:
  """Looks through a Hugging Face folder; reads no weights.

  Args:
    path: the folder.
    tokenizer: a tokenizer.json, or a folder with one; the folder's own by default.
    max_length: a shorter context than the checkpoint's.
    precision: of the computation; by default bfloat16 for weights of bfloat16, else float32.

  Raises:
    UserError: an unknown architecture, tensors that do not fit it, damaged files, no tokenizer or
      one of another vocabulary.
  """
  folder = open_folder(Path(path))
  config = with_length(model_config(folder.config), max_length)
  config, exits = with_exits(config, folder.path)
  tensors = {**folder.tensors, **exits}
  check_tensors(config, tensors)
  dtypes = {entry.dtype for entry in folder.tensors.values()}
  config = dataclasses.replace(config, precision=precision or source_precision(dtypes))
  return Source(
    folder=folder,
    config=config,
    tensors=tensors,
    tokenizer=_tokenizer(folder, tokenizer, config.vocab_size),
    num_bytes=sum(entry.num_bytes for entry in tensors.values()),
  )


def load_huggingface(
  source: Source,
  *,
  mesh: Mesh,
  rules: ShardingRules,
  dtype: Any = None,
  report: ReportFn = quiet,
) -> LoadedModel:
  """A Hugging Face model on a mesh, without a copy on disk: see `reading.read_params`."""
  model = ExitLM(source.config)
  params = read_params(model, source.tensors, mesh=mesh, rules=rules, dtype=dtype, report=report)
  return LoadedModel(
    model=model,
    params=params,
    tokenizer=source.tokenizer,
    step=0,
    directory=source.folder.path,
  )


def from_huggingface(
  source: Source,
  out: str | os.PathLike[str],
  *,
  dtype: Any = None,
  report: ReportFn = quiet,
) -> None:
  """Makes a model directory of a Hugging Face folder: checkpoint 0, which all commands take.

  Weights go block by block from the files into the checkpoint, through the host's memory alone: a
  few blocks are there at a time, however large the model is.

  Args:
    source: the folder.
    out: the model directory, which must not exist or be empty.
    dtype: of the parameters kept; None keeps bfloat16 and makes float32 of everything else.
    report: told the bytes that have been read since it was told last.

  Raises:
    UserError: `out` is taken, or cannot be written.
  """
  with new_folder(out) as directory:
    params = lazy_params(source.config, source.tensors, dtype=dtype, report=report)
    write_model_dir(directory, source.config, source.tokenizer, params=params)
    if sampling := _sampling(source.folder):
      write_sampling(directory, sampling)
    origin = directory / ORIGIN_FOLDER
    origin.mkdir()
    write_json_atomic(origin / CONFIG_FILE, source.folder.config)
    for name in CARRIED_FILES:
      file = source.folder.path / name
      if file.is_file():
        # Chat templates and names of special tokens are looked for beside the tokenizer.
        beside = name != GENERATION_FILE
        shutil.copyfile(file, (directory / TOKENIZER_FOLDER if beside else origin) / name)


def _tokenizer(
  folder: HuggingFaceFolder, given: str | os.PathLike[str] | None, vocab_size: int
) -> Tokenizer:
  path = Path(given) if given else folder.path
  path = path / TOKENIZER_FILE if path.is_dir() else path
  if not path.is_file():
    raise UserError(
      f'no {TOKENIZER_FILE} at {path.parent}: give one with --tokenizer, or write it with '
      'transformers (AutoTokenizer.from_pretrained, then save_pretrained)'
    )
  tokenizer = HuggingFaceTokenizer.from_file(path).for_trained_model(
    stop_ids=_stop_ids(folder, vocab_size)
  )
  padding = vocab_size - tokenizer.vocab_size
  if padding < 0 or padding > max(_MAX_PADDING * vocab_size, 8):
    raise UserError(
      f'the tokenizer {path} has {tokenizer.vocab_size} ids and the model {vocab_size}: it is '
      "not this model's; give the right one with --tokenizer"
    )
  return tokenizer


def _stop_ids(folder: HuggingFaceFolder, vocab_size: int) -> list[int]:
  """Ids that end an answer by generation_config.json, else by config.json."""
  for content in (_generation_config(folder), folder.config):
    value = content.get('eos_token_id')
    if value is not None:
      ids = value if isinstance(value, list) else [value]
      return [int(i) for i in ids if 0 <= int(i) < vocab_size]
  return []


def _sampling(folder: HuggingFaceFolder) -> dict[str, float]:
  """What generation_config.json says of sampling, as fields of `decode.Sampler`.

  Raises:
    UserError: a value that is no number.
  """
  content = _generation_config(folder)
  samples = content.get('do_sample')
  if samples is None:
    return {}
  if not samples:
    return {'temperature': 0.0}
  found = {'temperature': 1.0}
  for name in ('temperature', 'top_k', 'top_p', 'min_p'):
    value = content.get(name)
    if value is None:
      continue
    if isinstance(value, bool) or not isinstance(value, int if name == 'top_k' else (int, float)):
      raise UserError(f'{folder.path / GENERATION_FILE}: {name}={value!r} is no number: mend it')
    found[name] = value
  return found


def _generation_config(folder: HuggingFaceFolder) -> Mapping[str, Any]:
  path = folder.path / GENERATION_FILE
  return read_json_object(path) if path.is_file() else {}
