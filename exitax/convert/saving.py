"""Parameters as a model directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from exitax.checkpoint import CheckpointManager, LoadedModel, checkpoints_directory, write_model
from exitax.convert.folder import CARRIED_FILES, ORIGIN_FOLDER, TOKENIZER_FOLDER
from exitax.convert.new_folder import new_folder
from exitax.data import Tokenizer
from exitax.models import ModelConfig, Params


def write_model_dir(
  directory: Path, config: ModelConfig, tokenizer: Tokenizer, *, params: Params, step: int = 0
) -> None:
  """Writes a checkpoint, model.json and the tokenizer into an empty folder.

  Args:
    directory: the folder.
    config: of the model.
    tokenizer: its tokenizer.
    params: arrays, or `LazyArray`s: they are written block by block.
    step: of the checkpoint.
  """
  with CheckpointManager(checkpoints_directory(directory)) as manager:
    manager.save_streamed(step, {'params': params})
  write_model(directory, config, tokenizer)


def write_variant(loaded: LoadedModel, out: str | os.PathLike[str]) -> None:
  """A new model directory for a model that was made of the one in `loaded.directory`.

  What that one carries for Hugging Face comes along.

  Raises:
    UserError: `out` is taken, or cannot be written.
  """
  with new_folder(out) as directory:
    write_model_dir(
      directory, loaded.model.config, loaded.tokenizer, params=loaded.params, step=loaded.step
    )
    source = loaded.directory
    if (source / ORIGIN_FOLDER).is_dir():
      shutil.copytree(source / ORIGIN_FOLDER, directory / ORIGIN_FOLDER)
    for name in CARRIED_FILES:
      if (source / TOKENIZER_FOLDER / name).is_file():
        shutil.copyfile(source / TOKENIZER_FOLDER / name, directory / TOKENIZER_FOLDER / name)
