r"""Gives a model exits without touching the model: EE-Tuning.

  exitax tune-exits --gin_file=gin/runs/ee_tune.gin --backbone=runs/quickstart --model_dir=runs/tuned \
    --gin.exits.layers='(1, 3)'

The backbone is frozen, bit for bit, and runs forwards only, up to the last exit. Any number of exits is
tuned in one pass: they do not know of each other. MODEL_DIR is a model directory like any other, with the backbone
in it. It resumes as `exitax train` does, and takes the same meshes.
"""

from __future__ import annotations

import argparse

from exitax.commands import flags as flag_groups
from exitax.commands import gin_config, train
from exitax.commands.hosts import joined_hosts
from exitax.errors import UserError
from exitax.training import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  parser.add_argument(
    '--backbone', metavar='DIR', help='the model to freeze (sets the macro BACKBONE)'
  )
  train.add_arguments(parser)


def run(flags: argparse.Namespace) -> int:
  """Tunes."""
  flag_groups.start_jax(flags)
  if not flags.gin_file:
    raise UserError('tune-exits needs a run: --gin_file=gin/runs/ee_tune.gin')
  if flags.backbone:
    flags.gin_bindings.insert(0, f'BACKBONE = {flags.backbone!r}')
  flag_groups.parse_gin(flags, bind_model_dir=True)
  command = gin_config.build(train.TrainCommand)
  if command.run.trained is not Trained.EXITS:
    raise UserError(
      f'RunConfig.trained={command.run.trained.value!r} is not tuning exits: set it to '
      "'exits', or use exitax train"
    )
  with joined_hosts(flags, gin_config.operative_lines()):
    train.run_command(command, dry_run=flags.dry_run)
  return 0
