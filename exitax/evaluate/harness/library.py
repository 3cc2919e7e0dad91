"""lm-evaluation-harness is an extra: imported late, and asked for in words where it is missing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from exitax.errors import UserError

# Messages with `role` and `content` to the prompt for the next answer.
ChatFn = Callable[[Sequence[Mapping[str, Any]]], str]

_OLDEST = (0, 4, 13)  # As pyproject.toml says.
_INSTALL = "pip install 'exitax[harness]', or make install-dev"


def check_library() -> None:
  """Makes sure that `lm_eval` can be imported.

  Raises:
    UserError: it is not installed, or too old.
  """
  if importlib.util.find_spec('lm_eval') is None:
    raise UserError(f'--tasks needs lm-evaluation-harness: {_INSTALL}')
  version = metadata.version('lm_eval')
  if tuple(int(part) for part in re.findall(r'\d+', version)[:3]) < _OLDEST:
    oldest = '.'.join(map(str, _OLDEST))
    raise UserError(
      f'--tasks needs lm_eval {oldest} or later, and {version} is installed: {_INSTALL}'
    )


def import_library(name: str) -> Any:
  """A module of `lm_eval`, such as `lm_eval.tasks`.

  Raises:
    UserError: the library is not installed, or too old.
  """
  check_library()
  return importlib.import_module(name)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
  """Bootstraps in this process: forking one in which XLA runs threads can hang."""
  name = 'DISABLE_MULTIPROC'
  before = os.environ.get(name)
  os.environ[name] = '1'
  try:
    yield
  finally:
    if before is None:
      del os.environ[name]
    else:
      os.environ[name] = before
