"""A command that runs on several hosts at once."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence

import jax
import jaxlib

from exitax.commands.ending import FAILURE, report
from exitax.commands.flags import process_config
from exitax.parallel import join_processes, leave


@contextlib.contextmanager
def joined_hosts(flags: argparse.Namespace, configuration: Sequence[str]) -> Iterator[None]:
  """Starts jax together with the other hosts, if the flags name any, for the work within.

  An error within ends this process here and now: the others may be waiting for it.

  Args:
    flags: with those of `flags.add_host_flags`.
    configuration: lines 'name = value' that must be the same on all hosts.

  Raises:
    UserError: a host is missing or configured differently.
  """
  config = process_config(flags)
  if config is None:
    yield
    return
  join_processes(config, configuration=[*configuration, *_surroundings(flags)])
  index, count = jax.process_index(), jax.process_count()
  if index:
    logging.getLogger('exitax').setLevel(logging.ERROR)
  try:
    yield
  except SystemExit:
    raise
  except BaseException as error:
    leave(_report(error, prefix=f'exitax: process {index} of {count}' if index else 'exitax'))


def _report(error: BaseException, *, prefix: str) -> int:
  if isinstance(error, jax.errors.JaxRuntimeError) and _is_of_communication(error):
    print(
      f'{prefix}: another host is gone ({str(error).strip().splitlines()[0][:200]}): see its '
      'messages, then start the same command on all hosts again, which resumes',
      file=sys.stderr,
    )
    return FAILURE
  return report(error, prefix=prefix)


def _is_of_communication(error: BaseException) -> bool:
  text = str(error).lower()
  return any(word in text for word in ('gloo', 'connection', 'socket', 'nccl', 'heartbeat'))


def _surroundings(flags: argparse.Namespace) -> list[str]:
  """What must be the same beside the configuration: releases, devices, numerics."""
  # pyright does not know the attributes: jax makes them when it is imported.
  settings = jax.config.values
  names = ('jax_enable_x64', 'jax_default_matmul_precision', 'jax_default_prng_impl')
  return [
    f'python = {sys.version_info.major}.{sys.version_info.minor}',
    f'exitax = {_version("exitax")}',
    f'jax = {jax.__version__}',
    f'jaxlib = {jaxlib.__version__}',
    f'--emulate_devices = {flags.emulate_devices}',
    f'--dry_run = {getattr(flags, "dry_run", False)}',
    *(f'{name} = {settings[name]}' for name in names),
  ]


def _version(package: str) -> str:
  from importlib import metadata

  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:  # Run from a folder, not installed.
    return 'unknown'
