"""Flags that commands share, and what they do before anything else runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax

from exitax.checkpoint import CERTIFIED
from exitax.commands import gin_config
from exitax.data import cache_root
from exitax.errors import UserError
from exitax.parallel import ProcessConfig, emulate_devices

# What says where a process stands among several.
_PLACE = ('coordinator_address', 'num_processes', 'process_id')

Config = TypeVar('Config')


def add_gin_flags(parser: argparse.ArgumentParser) -> None:
  """T5X's flags for gin; `--gin.NAME=VALUE` is taken out before parsing."""
  group = parser.add_argument_group(
    'gin', '--gin.NAME=VALUE binds a parameter or a macro (strings in quotes); it may be repeated'
  )
  group.add_argument(
    '--gin_file',
    action='append',
    default=[],
    metavar='FILE',
    help='a gin file, such as gin/runs/quickstart.gin; repeatable, later ones win',
  )
  group.add_argument(
    '--gin_search_paths',
    default='',
    metavar='DIRS',
    help='comma-separated folders to look for gin files in, before gin/',
  )


def add_device_flags(parser: argparse.ArgumentParser) -> None:
  """How many devices an emulated mesh has."""
  parser.add_argument(
    '--emulate_devices',
    type=int,
    default=0,
    metavar='N',
    help='split the CPU into N devices, to try a mesh on a laptop',
  )


def add_host_flags(parser: argparse.ArgumentParser) -> None:
  """Which of several processes this one is; jax's own names."""
  group = parser.add_argument_group(
    'several hosts', 'the same command on every host, with another --process_id on each'
  )
  group.add_argument(
    '--coordinator_address', metavar='HOST:PORT', help='host of process 0 and a free port on it'
  )
  group.add_argument('--num_processes', type=int, metavar='N', help='processes of the run')
  group.add_argument('--process_id', type=int, metavar='I', help='this one, 0 to N-1')
  group.add_argument(
    '--multihost',
    action='store_true',
    help='in place of these three: ask the cluster (SLURM, a TPU pod, Open MPI)',
  )
  group.add_argument(
    '--roll_call_seconds',
    type=float,
    default=300.0,
    metavar='S',
    help='how long to wait for all processes before naming those that are missing',
  )
  group.add_argument(
    '--heartbeat_timeout_seconds',
    type=int,
    default=100,
    metavar='S',
    help='end the run when a process has given no sign of life for so long',
  )


def process_config(flags: argparse.Namespace) -> ProcessConfig | None:
  """This process's place among several; None where the run has one process.

  Raises:
    UserError: some of the flags without the others, or out of range.
  """
  named = [f'--{name}' for name in _PLACE if getattr(flags, name) is not None]
  if flags.multihost and named:
    raise UserError(f'--multihost asks the cluster for {", ".join(named)}: give one or the other')
  config = ProcessConfig(
    coordinator_address=flags.coordinator_address,
    num_processes=flags.num_processes,
    process_id=flags.process_id,
    roll_call_seconds=flags.roll_call_seconds,
    heartbeat_seconds=flags.heartbeat_timeout_seconds,
  )
  several = flags.multihost or config.num_processes not in (None, 1)
  return config if several else None


def add_model_dir(parser: argparse.ArgumentParser, *, purpose: str) -> None:
  """The directory of a model."""
  parser.add_argument('--model_dir', metavar='DIR', help=purpose)


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
  """A model to use: its directory, which checkpoint, which of its exits."""
  add_model_dir(parser, purpose='the model: what `exitax train` wrote')
  parser.add_argument('--step', type=int, help='which checkpoint (the latest by default)')
  parser.add_argument(
    '--exits',
    type=exit_layers,
    metavar='LAYERS',
    help="which of the model's exits to use, such as 2,4, or none (all by default)",
  )


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
  """How tokens are chosen: the fields of `Sampler`, and a seed."""
  sampling = parser.add_argument_group('sampling')
  sampling.add_argument(
    '--temperature', type=float, help='0 is greedy: the default, unless the model says otherwise'
  )
  sampling.add_argument('--top_k', type=int, metavar='K', help='keep the K best tokens')
  sampling.add_argument('--top_p', type=float, metavar='P', help='keep the best that reach P')
  sampling.add_argument(
    '--min_p', type=float, metavar='P', help='keep those above P times the best'
  )
  sampling.add_argument('--seed', type=int, metavar='N', help='0 by default')


def exit_layers(text: str) -> tuple[int, ...]:
  """The value of `--exits`: layers with commas between them, or 'none'.

  Raises:
    UserError: anything else.
  """
  if text == 'none':
    return ()
  try:
    return tuple(sorted({int(part) for part in text.split(',')}))
  except ValueError:
    raise UserError(f"--exits={text} is not layers with commas, such as 2,4, or 'none'") from None


def thresholds(text: str) -> float | tuple[float, ...] | str:
  """The value of `--threshold`: a number, numbers with commas between them, or 'certified'.

  Raises:
    UserError: anything else.
  """
  if text == CERTIFIED:
    return text
  try:
    values = tuple(float(part) for part in text.split(','))
  except ValueError:
    raise UserError(
      f"--threshold={text} is not a number, numbers with commas, or '{CERTIFIED}'"
    ) from None
  return values[0] if len(values) == 1 else values


def asks_for(flags: argparse.Namespace, flag: str, own: Sequence[str], *, part: str) -> bool:
  """Whether the command line has `--flag`, which begins a part of a command.

  Args:
    flags: the command line.
    flag: the flag's name.
    own: flags that mean something beside it alone; None where they were not given.
    part: what the part is for.

  Raises:
    UserError: it has one of `own` without it.
  """
  if getattr(flags, flag) is not None:
    return True
  for name in own:
    if getattr(flags, name) is not None:
      raise UserError(f'--{name} is for {part}: add --{flag}=NAME, or leave it out')
  return False


def parse_gin(
  flags: argparse.Namespace,
  *,
  text: str = '',
  bind_model_dir: bool,
  if_required: Mapping[str, object] | None = None,
) -> None:
  """Reads the gin files and bindings of a command line.

  Args:
    flags: the parsed command line.
    text: gin bindings that come before all others.
    bind_model_dir: whether `--model_dir=DIR` stands for `--gin.MODEL_DIR="'DIR'"`, as in commands
      that write there.
    if_required: values for macros that files of runs require and this command does not read.
  """
  bindings = list(flags.gin_bindings)
  if bind_model_dir and flags.model_dir:
    bindings.insert(0, f'MODEL_DIR = {flags.model_dir!r}')
  paths = [path for path in flags.gin_search_paths.split(',') if path]
  gin_config.parse(flags.gin_file, bindings, extra_paths=paths, text=text, if_required=if_required)


def make_folder(path: str | os.PathLike[str], *, name: str) -> Path:
  """A folder that files can be written to, created when absent: asked before the work, not after.

  Raises:
    UserError: it cannot be written to.
  """
  folder = Path(path)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'{name}={path} cannot be written to ({reason}): choose another') from None
  return folder


def override(config: Config, flags: argparse.Namespace) -> Config:
  """The frozen dataclass `config` with every field for which a flag of that name was given."""
  assert dataclasses.is_dataclass(config)
  given = {
    field.name: getattr(flags, field.name)
    for field in dataclasses.fields(config)
    if getattr(flags, field.name, None) is not None
  }
  return dataclasses.replace(config, **given)  # type: ignore[type-var]


def start_jax(flags: argparse.Namespace) -> None:
  """Sets devices and the compile cache; must come before the first array is made."""
  if getattr(flags, 'emulate_devices', 0):
    emulate_devices(flags.emulate_devices)
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', str(cache_root(None) / 'jax'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
