"""LoRA adapters in PEFT's file format: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exitax.checkpoint import LoadedModel
from exitax.convert.folder import read_json_object
from exitax.convert.new_folder import new_folder
from exitax.convert.reading import copy_tensor
from exitax.convert.safetensors_file import DTYPES, TensorEntry, dtype_name, read_header, write_file
from exitax.convert.tensors import LINEARS, TensorPlace, adapter_places
from exitax.errors import UserError
from exitax.layers import LoraConfig
from exitax.models import ExitLM, Params
from exitax.parallel import path_name

CONFIG_FILE = 'adapter_config.json'
WEIGHTS_FILE = 'adapter_model.safetensors'
# Name of a linear map here -> its name in transformers, which PEFT targets.
_TARGETS = {ours.rpartition('/')[2]: theirs.rpartition('.')[2] for ours, theirs in LINEARS.items()}
_OURS = {theirs: ours for ours, theirs in _TARGETS.items()}


def to_peft(loaded: LoadedModel, out: str | os.PathLike[str], *, base: str | None = None) -> None:
  """Writes the adapters of a model.

  Args:
    loaded: a model with adapters.
    out: the folder, which must not exist or be empty.
    base: what PEFT calls the base model: a path or a name on the hub.

  Raises:
    UserError: there are no adapters, or `out` is taken.
  """
  lora = loaded.model.config.lora
  if lora is None:
    raise UserError(f'{loaded.directory} has no adapters: train some (gin/runs/lora.gin)')
  content = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'r': lora.rank,
    'lora_alpha': lora.alpha,
    'lora_dropout': 0.0,
    'target_modules': [_TARGETS[name] for name in lora.targets],
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
  }
  leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(loaded.params)}
  with new_folder(out) as folder:
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + '\n')
    write_file(
      folder / WEIGHTS_FILE,
      [
        (place.name, dtype_name(leaves[path].dtype), place.shape, [_row(leaves[path], place)])
        for path, places in adapter_places(loaded.model.config).items()
        for place in places
      ],
      metadata={'format': 'pt'},
    )


def from_peft(loaded: LoadedModel, path: str | os.PathLike[str]) -> LoadedModel:
  """A model with the adapters of a PEFT folder, in the precision that they were saved in.

  Raises:
    UserError: something that is not plain LoRA, adapters of other maps or of another model.
  """
  folder = Path(path)
  if loaded.model.config.lora is not None:
    raise UserError(f'{loaded.directory} has adapters already: merge them first')
  lora = _lora_config(read_json_object(folder / CONFIG_FILE), folder)
  if not (folder / WEIGHTS_FILE).is_file():
    raise UserError(f'no {WEIGHTS_FILE} in {folder}: give a folder that PEFT wrote as safetensors')
  tensors = read_header(folder / WEIGHTS_FILE)
  config = dataclasses.replace(loaded.model.config, lora=lora)
  places = adapter_places(config)
  _check(places, tensors, folder)
  params = loaded.params
  for leaf_path, group in places.items():
    params = _with_leaf(params, leaf_path.split('/'), jnp.asarray(_stacked(group, tensors)))
  model = ExitLM(config)
  # In the order of the model's own tree.
  wanted = model.abstract_params()
  ordered = jax.tree.map_with_path(lambda path, _: _leaf_at(params, path), wanted)
  return dataclasses.replace(loaded, model=model, params=ordered)


def _lora_config(content: Mapping[str, Any], folder: Path) -> LoraConfig:
  kind = content.get('peft_type')
  if kind != 'LORA':
    raise UserError(f'{folder} holds {kind}: LORA is read')
  for name in ('use_dora', 'fan_in_fan_out', 'modules_to_save', 'rank_pattern', 'alpha_pattern'):
    if content.get(name):
      raise UserError(f'{folder / CONFIG_FILE} has {name}={content[name]!r}, which is not read')
  if content.get('bias', 'none') != 'none':
    raise UserError(f'{folder / CONFIG_FILE} trains biases ({content["bias"]}): not read')
  targets = content.get('target_modules')
  unknown = [name for name in targets or () if name not in _OURS]
  if not isinstance(targets, list) or unknown:
    raise UserError(
      f'{folder / CONFIG_FILE} targets {unknown or targets}: some of {", ".join(_OURS)} are read'
    )
  rank, alpha = int(content['r']), float(content['lora_alpha'])
  if content.get('use_rslora'):
    alpha *= math.sqrt(rank)  # alpha / sqrt(rank), arXiv 2312.03732.
  # In the order of a block, whatever order they were saved in: files come out the same.
  names = tuple(ours for ours, theirs in _TARGETS.items() if theirs in targets)
  return LoraConfig(rank=rank, alpha=alpha, targets=names)


def _check(
  places: Mapping[str, tuple[TensorPlace, ...]], tensors: Mapping[str, TensorEntry], folder: Path
) -> None:
  wanted = {place.name: place for group in places.values() for place in group}
  for name, place in wanted.items():
    entry = tensors.get(name)
    found = None if entry is None else list(entry.shape)
    if found != list(place.shape):
      raise UserError(
        f'{folder / WEIGHTS_FILE}: {name} is {found}, this model needs {list(place.shape)}: '
        'is it the adapter of another model?'
      )
  extra = [name for name in tensors if name not in wanted]
  if extra:
    raise UserError(f'{folder / WEIGHTS_FILE} has {extra[0]}, for which this model has no place')


def _stacked(group: tuple[TensorPlace, ...], tensors: Mapping[str, TensorEntry]) -> np.ndarray:
  dtype = DTYPES[tensors[group[0].name].dtype]
  kept = dtype if dtype == np.dtype(jnp.bfloat16) else np.dtype(np.float32)
  leaf = np.empty((len(group), *group[0].leaf_shape), kept)
  for row, place in zip(leaf, group, strict=True):
    copy_tensor(row, place, tensors[place.name])
  return leaf


def _row(leaf: jax.Array, place: TensorPlace) -> np.ndarray:
  return np.ascontiguousarray(place.to_torch(np.asarray(leaf[place.layer])))


def _with_leaf(node: Params, path: list[str], leaf: jax.Array) -> Params:
  name, *rest = path
  return {**node, name: _with_leaf(node.get(name, {}), rest, leaf) if rest else leaf}


def _leaf_at(params: Params, path: Any) -> Any:
  for key in path:
    params = params[key.key]
  return params
