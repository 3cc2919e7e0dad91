"""A model in memory as a model directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from exitax.checkpoint import CheckpointManager, LoadedModel, checkpoints_directory, write_model
from exitax.convert.folder import CARRIED_FILES, ORIGIN_FOLDER, TOKENIZER_FOLDER
from exitax.convert.new_folder import new_folder


def write_model_dir(loaded: LoadedModel, directory: Path) -> None:
  """Writes checkpoint `loaded.step`, model.json and the tokenizer into an empty folder."""
  with CheckpointManager(checkpoints_directory(directory)) as manager:
    manager.save_in_place(loaded.step, {'params': loaded.params})
  write_model(directory, loaded.model.config, loaded.tokenizer)


def write_variant(loaded: LoadedModel, out: str | os.PathLike[str]) -> None:
  """A new model directory for a model that was made of the one in `loaded.directory`.

  What that one carries for Hugging Face comes along.

  Raises:
    UserError: `out` is taken, or cannot be written.
  """
  with new_folder(out) as directory:
    write_model_dir(loaded, directory)
    source = loaded.directory
    if (source / ORIGIN_FOLDER).is_dir():
      shutil.copytree(source / ORIGIN_FOLDER, directory / ORIGIN_FOLDER)
    for name in CARRIED_FILES:
      if (source / TOKENIZER_FOLDER / name).is_file():
        shutil.copyfile(source / TOKENIZER_FOLDER / name, directory / TOKENIZER_FOLDER / name)
