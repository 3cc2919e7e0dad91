"""What the processes of one run decide together; with one process everything is as if absent.

All of them call these functions, in the same order.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from exitax.errors import UserError

Result = TypeVar('Result')


def any_process(flag: bool) -> bool:
  """Whether `flag` is set in any process."""
  return bool(_gather(np.asarray(flag)).any())


def from_main_process(value: int) -> int:
  """Process 0's value of a 32-bit integer, in every process."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))


def raise_together(
  error: BaseException | None, *, part: str, kind: type[UserError] = UserError
) -> None:
  """Raises in every process when any process has an error; otherwise acts as a barrier.

  A process that failed alone would leave the others waiting for it in the next collective.

  Args:
    error: this process's own.
    part: what was done, for the message: 'its part of the checkpoint'.
    kind: the error of those that have none of their own.

  Raises:
    BaseException: this process's own `error`.
    UserError: of type `kind`, another process has an error; names that process.
  """
  culprits = np.flatnonzero(_gather(np.asarray(error is not None)))
  if error is not None:
    raise error
  if culprits.size:
    raise kind(
      f'process {culprits[0]} of {jax.process_count()} failed in {part}: '
      'see the message of that process'
    )


def do_together(work: Callable[[], Result], *, part: str) -> Result:
  """`work()`, whose errors end every process: see `raise_together`."""
  try:
    result = work()
  except Exception as error:
    raise_together(error, part=part)
    raise
  raise_together(None, part=part)
  return result


def check_same(value: str, *, name: str, fix: str) -> None:
  """Passes if `value` is the same in every process.

  Raises:
    UserError: it differs; names a process, its host and both values' digests, in every process.
  """
  digest = hashlib.sha256(value.encode()).digest()
  host = socket.gethostname().encode()[:64].ljust(64)
  rows = _gather(np.frombuffer(digest + host, np.uint8)).reshape(-1, 96)
  for process, row in enumerate(rows):
    if bytes(row[:32]) != bytes(rows[0, :32]):
      where = bytes(row[32:]).decode(errors='replace').strip()
      raise UserError(
        f'{name} of process {process} ({where}) is not that of process 0: '
        f'{bytes(row[:6]).hex()} there, {bytes(rows[0, :6]).hex()} on process 0: {fix}'
      )


def fetch(tree: Any) -> Any:
  """NumPy values of a tree of arrays that may be spread over processes."""
  if jax.process_count() > 1:
    tree = jax.tree.map(_here, tree)
  return jax.device_get(tree)


def _here(leaf: Any) -> Any:
  """All of an array on this process."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    return leaf
  if leaf.is_fully_replicated:
    return leaf.addressable_data(0)
  return multihost_utils.process_allgather(leaf, tiled=True)


def _gather(value: np.ndarray) -> np.ndarray:
  """Every process's value, `[processes, ...]`."""
  if jax.process_count() == 1:
    return value[None]
  return np.asarray(multihost_utils.process_allgather(value))
