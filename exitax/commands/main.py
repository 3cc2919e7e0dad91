"""The `exitax` program: finds the command, and turns what a user can mend into one line."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from exitax.commands.ending import report
from exitax.errors import UserError

# Name -> one line of help; the module of the same name is imported only when it is run.
COMMANDS = {
  'quickstart': 'train a small model on real text, evaluate every exit, generate: no arguments',
  'train': 'train a model from gin files; the same command resumes',
  'evaluate': 'score every exit and 21 exit thresholds; write JSON, CSV and a picture',
  'advise': 'does early exit pay for a model on its data here, and which kind',
  'calibrate': 'certify an exit threshold: how much text changes, with a guarantee',
  'generate': 'write text, with the exit depth of every token',
  'think': 'several thinkers on one problem at once, each seeing what the others write',
  'tune-confidence': 'train a confidence classifier for every exit of a frozen model',
  'tune-exits': 'give a model exits without touching the model (EE-Tuning)',
  'serve': 'answer OpenAI clients over HTTP, with the exit depth of every token; a page at /',
  'convert': 'Hugging Face checkpoints to model directories, and back',
  'plan': 'compile a training step for a TPU slice that is not here; what fits, and how fast',
  'inspect': 'print the table of parameters: shapes, logical axes, mesh axes, bytes per device',
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
  """Runs a command and exits: 0, or 2 with one line on standard error for a user's mistake."""
  arguments = list(sys.argv[1:] if argv is None else argv)
  _quieten_libraries()
  try:
    sys.exit(_run(arguments))
  except (UserError, BrokenPipeError, KeyboardInterrupt) as error:
    sys.exit(report(error))


def _run(arguments: list[str]) -> int:
  if not arguments or arguments[0] in ('-h', '--help'):
    print(_overview())
    return 0
  if arguments[0] == '--version':
    from importlib import metadata

    print(f'exitax {metadata.version("exitax")}')
    return 0
  name = arguments[0]
  if name not in COMMANDS:
    raise UserError(f'no command {name!r}: choose {", ".join(COMMANDS)} (exitax --help)')
  command = importlib.import_module(f'exitax.commands.{name.replace("-", "_")}')
  parser = _Parser(
    prog=f'exitax {name}',
    description=command.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  command.add_arguments(parser)
  own, bindings = _split_bindings(arguments[1:])
  flags = parser.parse_args(own)
  flags.gin_bindings = bindings
  return command.run(flags)


class _Parser(argparse.ArgumentParser):
  """Tells a mistake in one line, as every other mistake is told, without all flags before it."""

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message}; see {self.prog} --help')


def _split_bindings(arguments: list[str]) -> tuple[list[str], list[str]]:
  """Takes `--gin.NAME=VALUE` out of the arguments, as `NAME = VALUE`."""
  own, bindings = [], []
  for argument in arguments:
    if not argument.startswith('--gin.'):
      own.append(argument)
      continue
    name, equals, value = argument.removeprefix('--gin.').partition('=')
    if not equals or not name:
      raise UserError(f'{argument}: write --gin.NAME=VALUE, strings in quotes')
    bindings.append(f'{name} = {value}')
  return own, bindings


def _overview() -> str:
  width = max(map(len, COMMANDS))
  lines = [f'  {name:<{width}}  {text}' for name, text in COMMANDS.items()]
  return '\n'.join(
    [
      'usage: exitax COMMAND [flags]',
      '',
      'Language models that can stop early: train, decode and evaluate them with JAX.',
      '',
      *lines,
      '',
      'exitax COMMAND --help tells more. A first run: exitax quickstart',
    ]
  )


def _quieten_libraries() -> None:
  """Libraries log paths tried and names deprecated: only exitax's own notices reach a user."""
  own = logging.getLogger('exitax')
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('exitax: %(message)s'))
  own.handlers, own.propagate = [handler], False
  root = logging.getLogger()
  if not root.handlers:  # A test runner's stay.
    root.addHandler(logging.NullHandler())
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
