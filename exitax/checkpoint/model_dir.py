"""A model directory: what must lie beside checkpoints so that they can be used on their own.

MODEL_DIR/model.json         configuration of the model, digest of its tokenizer
MODEL_DIR/tokenizer/         the tokenizer
MODEL_DIR/checkpoints/<step>/
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from exitax.checkpoint.artifacts import checkpoints_directory, read_json, write_json_atomic
from exitax.checkpoint.errors import CheckpointError
from exitax.checkpoint.manager import CheckpointManager
from exitax.data import Tokenizer, check_tokenizer, load_tokenizer
from exitax.errors import UserError
from exitax.models import ExitLM, ModelConfig, Params
from exitax.parallel import ShardingRules, path_name, tree_shardings

FORMAT = 1
MODEL_FILE = 'model.json'
TOKENIZER_FOLDER = 'tokenizer'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
  """A trained model, ready to be scored or decoded.

  Attributes:
    model: configuration and functions.
    params: parameters with stacked blocks, in the shardings of the mesh and the formats they were
      saved in: float32, or bfloat16 where a checkpoint was converted from it.
    tokenizer: the one it was trained with.
    step: optimizer steps behind the parameters.
    directory: where it came from.
  """

  model: ExitLM
  params: Params
  tokenizer: Tokenizer
  step: int
  directory: Path


def write_model(
  model_dir: str | os.PathLike[str], config: ModelConfig, tokenizer: Tokenizer
) -> None:
  """Writes `model.json` and the tokenizer, or checks that those already there are the same.

  Raises:
    UserError: the directory holds another model or tokenizer; nothing is overwritten.
  """
  directory = Path(model_dir)
  content = {'format': FORMAT, 'model': config.to_dict(), 'tokenizer_digest': tokenizer.digest}
  path, folder = directory / MODEL_FILE, directory / TOKENIZER_FOLDER
  if path.exists():
    _check_same(directory, found=_read_content(directory), wanted=content)
  # model.json comes last, so a tokenizer beside one is whole: writing it again could only break it.
  if not (path.exists() and folder.exists()):
    tokenizer.save(folder)
  write_json_atomic(path, content)


def tokenizer_directory(model_dir: str | os.PathLike[str]) -> Path:
  """The folder of a model directory that holds its tokenizer."""
  return Path(model_dir) / TOKENIZER_FOLDER


def read_model(model_dir: str | os.PathLike[str]) -> tuple[ModelConfig, Tokenizer]:
  """The configuration and the tokenizer of a model directory.

  Raises:
    UserError: a file is missing or damaged, or the tokenizer is not the one of training.
  """
  directory = Path(model_dir)
  content = _read_content(directory)
  tokenizer = load_tokenizer(directory / TOKENIZER_FOLDER)
  check_tokenizer(tokenizer, expected_digest=content['tokenizer_digest'], where=str(directory))
  return ModelConfig.from_dict(content['model']), tokenizer


def load_model(
  model_dir: str | os.PathLike[str],
  *,
  mesh: Mesh,
  rules: ShardingRules,
  step: int | None = None,
  exits: Collection[int] | None = None,
) -> LoadedModel:
  """Reads the parameters (no optimizer state) of a checkpoint onto a mesh.

  Args:
    model_dir: what training wrote.
    mesh: where the parameters go.
    rules: how they are sharded.
    step: which checkpoint; the latest by default.
    exits: layers whose exits are used; the parameters of the others are not read. None uses all.

  Raises:
    UserError: anything missing, damaged, or that does not fit the mesh.
  """
  config, tokenizer = read_model(model_dir)
  if exits is not None:
    config = config.with_exits(exits)
  model = ExitLM(config)
  shapes = model.abstract_params()
  shardings = tree_shardings(shapes, model.logical_axes(), mesh, rules)
  with CheckpointManager(checkpoints_directory(model_dir)) as manager:
    saved = manager.info(step)

    def abstract(path: Any, shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
      spec = saved.leaves.get(f'params/{path_name(path)}')
      narrow = spec is not None and spec.dtype == 'bfloat16'
      dtype = jax.numpy.bfloat16 if narrow else shape.dtype
      return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=sharding)

    wanted = jax.tree.map_with_path(abstract, shapes, shardings)
    restored = manager.restore_params(wanted, step=saved.step, partial=exits is not None)
  return LoadedModel(
    model=model,
    params=restored.state,
    tokenizer=tokenizer,
    step=restored.step,
    directory=Path(model_dir),
  )


def _read_content(directory: Path) -> dict[str, Any]:
  content = read_json(directory / MODEL_FILE)
  known = (
    isinstance(content, dict)
    and content.get('format') == FORMAT
    and isinstance(content.get('model'), dict)
    and isinstance(content.get('tokenizer_digest'), str)
  )
  if not known:
    raise CheckpointError(
      f'{directory / MODEL_FILE} is not a model file of format {FORMAT}: train again'
    )
  return content


def _check_same(directory: Path, *, found: dict[str, Any], wanted: dict[str, Any]) -> None:
  if found['tokenizer_digest'] != wanted['tokenizer_digest']:
    raise UserError(
      f'{directory} was made with another tokenizer '
      f'({found["tokenizer_digest"][:12]}, now {wanted["tokenizer_digest"][:12]}): '
      'use the same data and vocabulary, or another model directory'
    )
  # Formats of the computation may change between runs; shapes may not.
  free = {'precision', 'remat', 'max_length'}
  # As this version writes it: fields that have come since then have their defaults.
  old, new = ModelConfig.from_dict(found['model']).to_dict(), wanted['model']
  for name in sorted(set(old) | set(new)):
    if name not in free and old.get(name) != new.get(name):
      raise UserError(
        f'{directory} holds a model with {name}={old.get(name)}, the configuration says '
        f'{new.get(name)}: change it back, or choose another model directory'
      )
