"""Whether the slots fit into memory: asked before they are allocated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from exitax.errors import UserError
from exitax.parallel import format_bytes

_MEMINFO = Path('/proc/meminfo')


def check_slots(make_row: Callable[[], Any], *, num_slots: int, columns: int) -> None:
  """Refuses more slots than fit; says nothing where free memory is not known.

  Args:
    make_row: gives the arrays of one slot; it is traced, not run.
    num_slots: slots; one row more takes prompts on their way in.
    columns: of each slot.

  Raises:
    UserError: they do not fit.
  """
  leaves = jax.tree.leaves(jax.eval_shape(make_row))
  row = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  needed, free = row * (num_slots + 1), free_memory(jax.devices()[0])
  if free is None or needed <= free:
    return
  most = free // row - 1
  fix = f'set --num_slots={most} at most, or a' if most > 0 else 'set a'
  raise UserError(
    f'num_slots={num_slots} of {columns} tokens take {format_bytes(needed)} and '
    f'{format_bytes(free)} are free: {fix} lower --capacity'
  )


def free_memory(device: Any) -> int | None:
  """Bytes that a device can still give; None where nothing says so."""
  stats = device.memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  if device.platform != 'cpu':
    return None
  try:
    lines = _MEMINFO.read_text(encoding='ascii').splitlines()
  except OSError:  # Not Linux.
    return None
  kilobytes = [line.split()[1] for line in lines if line.startswith('MemAvailable:')]
  return int(kilobytes[0]) * 1024 if kilobytes else None
