"""Agreement between the processes of one run: no-ops when there is a single process."""

from __future__ import annotations

import jax

from exitax import parallel
from exitax.checkpoint.errors import CheckpointError
from exitax.parallel import from_main_process as from_main_process


def is_main_process() -> bool:
  """Whether this process writes the files that exist once (manifest, retention)."""
  return jax.process_index() == 0


def raise_together(error: BaseException | None) -> None:
  """Raises in every process when any process has an error: see `parallel.raise_together`.

  Raises:
    BaseException: this process's own `error`.
    CheckpointError: another process has an error; names that process.
  """
  parallel.raise_together(error, part='its part of the checkpoint', kind=CheckpointError)
