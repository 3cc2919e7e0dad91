"""How a command ends when it cannot go on: one line and an exit status."""

from __future__ import annotations

import os
import sys
import traceback

from exitax.errors import UserError

FAILURE = 1
USAGE_ERROR = 2
INTERRUPTED = 130


def report(error: BaseException, *, prefix: str = 'exitax') -> int:
  """Says on standard error what happened; returns the exit status.

  Args:
    error: what ended the command: a user's mistake is told in one line, a fault with its traceback.
    prefix: begins the line.
  """
  if isinstance(error, UserError):
    # Configuration libraries append lines of their own to a message: the first is ours.
    print(f'{prefix}: {str(error).strip().splitlines()[0]}', file=sys.stderr)
    return USAGE_ERROR
  if isinstance(error, BrokenPipeError):
    # The reader (such as `head`) has what it wanted.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  if isinstance(error, KeyboardInterrupt):
    print(f'{prefix}: interrupted', file=sys.stderr)
    return INTERRUPTED
  traceback.print_exception(error)
  return FAILURE
