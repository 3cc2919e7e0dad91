"""Trains an early-exit model as gin files say; the same command resumes where it stopped.

  exitax train --gin_file=gin/runs/quickstart.gin --model_dir=runs/mine
  exitax train --gin_file=gin/runs/quickstart.gin --model_dir=runs/mine --gin.TRAIN_STEPS=2000

MODEL_DIR receives config.gin (everything that was in force), model-info.txt (the table of
parameters), model.json and tokenizer/, checkpoints/, metrics.jsonl and tensorboard/.
SIGTERM or Ctrl-C saves and exits 0, on all hosts if one of several is told so.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax

import gin
from exitax.checkpoint import write_bytes_atomic
from exitax.commands import flags as flag_groups
from exitax.commands import gin_config
from exitax.commands.hosts import joined_hosts
from exitax.commands.inspect import describe
from exitax.errors import UserError
from exitax.parallel import do_together
from exitax.training import (
  ConsoleDisplay,
  Display,
  QuietDisplay,
  RunConfig,
  TrainResult,
  train,
)

CONFIG_FILE = 'config.gin'
INFO_FILE = 'model-info.txt'


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
  """What `exitax train` is bound to in gin, under the name `train`.

  Attributes:
    model_dir: where files go.
    run: the run.
  """

  model_dir: str
  run: RunConfig


gin_config.make_configurable(TrainCommand, name='train')


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Flags of the command."""
  flag_groups.add_model_dir(parser, purpose='where files go (sets the macro MODEL_DIR)')
  parser.add_argument(
    '--dry_run', action='store_true', help='print model, mesh and memory, and train nothing'
  )
  flag_groups.add_gin_flags(parser)
  flag_groups.add_device_flags(parser)
  flag_groups.add_host_flags(parser)


def run(flags: argparse.Namespace) -> int:
  """Trains."""
  flag_groups.start_jax(flags)
  if not flags.gin_file:
    raise UserError('train needs a run: --gin_file=gin/runs/quickstart.gin')
  flag_groups.parse_gin(flags, bind_model_dir=True)
  command = gin_config.build(TrainCommand)
  with joined_hosts(flags, gin_config.operative_lines()):
    run_command(command, dry_run=flags.dry_run)
  return 0


def run_command(command: TrainCommand, *, dry_run: bool) -> None:
  """Trains, or says what would be trained."""
  if jax.process_index():
    # Process 0 speaks for all.
    if not dry_run:
      launch(command, QuietDisplay())
    return
  with ConsoleDisplay() as display:
    if dry_run:
      display.message(describe(command.run))
      return
    result = launch(command, display)
  if not result.finished:
    print(f'stopped at step {result.step}: the same command resumes', flush=True)


def launch(command: TrainCommand, display: Display) -> TrainResult:
  """Writes the run's description into its directory (process 0 does), then trains."""
  directory = Path(command.model_dir)

  def write() -> None:
    flag_groups.make_folder(directory, name='MODEL_DIR')  # Every process has a part of checkpoints.
    if jax.process_index() == 0:
      write_bytes_atomic(directory / CONFIG_FILE, gin.operative_config_str(100).encode())
      write_bytes_atomic(directory / INFO_FILE, (describe(command.run) + '\n').encode())

  do_together(write, part='describing the run in MODEL_DIR')
  return train(command.run, directory, display=display)
