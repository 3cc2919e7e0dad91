"""Agreement between the processes of one run: no-ops when there is a single process."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from exitax.checkpoint.errors import CheckpointError


def is_main_process() -> bool:
  """Whether this process writes the files that exist once (manifest, retention)."""
  return jax.process_index() == 0


def raise_together(error: BaseException | None) -> None:
  """Raises in every process when any process has an error; otherwise acts as a barrier.

  A process that failed alone would leave the others waiting for it in the next collective.

  Raises:
    BaseException: this process's own `error`.
    CheckpointError: another process has an error; names that process.
  """
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(np.asarray(error is not None))
    culprits = np.flatnonzero(np.ravel(failed))
    if error is None and culprits.size:
      raise CheckpointError(
        f'process {culprits[0]} of {jax.process_count()} failed in its part of the checkpoint: '
        'see the message of that process'
      )
  if error is not None:
    raise error


def from_main_process(value: int) -> int:
  """Process 0's value of a 32-bit integer, in every process."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.asarray(value, np.int32)))
