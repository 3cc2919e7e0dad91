"""Several CPU devices in place of accelerators: meshes on a laptop, and in the tests."""

from __future__ import annotations

import os

import jax

from exitax.errors import UserError

# XLA's concurrent order lets two devices start collectives that do not depend on each other (one in
# a loop, one beside it) in different order; where threads are few, each then waits for the other
# until XLA ends the process. With this schedule every device keeps the program's order.
COLLECTIVES_IN_ORDER = '--xla_cpu_enable_concurrency_optimized_scheduler=false'


def emulate_devices(num_devices: int) -> None:
  """Makes jax see that many CPU devices; must come before the first array is made.

  Raises:
    UserError: fewer than one.
  """
  if num_devices < 1:
    raise UserError(f'--emulate_devices={num_devices} must be at least 1')
  keep_collectives_in_order()
  # pyright does not know the attribute: jax makes it when it is imported.
  if jax.config.jax_num_cpu_devices != num_devices:  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', num_devices)


def keep_collectives_in_order() -> None:
  """For CPU devices, of one process or several: see `COLLECTIVES_IN_ORDER`; others ignore it."""
  flags = os.environ.get('XLA_FLAGS', '')
  if COLLECTIVES_IN_ORDER.partition('=')[0] not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} {COLLECTIVES_IN_ORDER}'.strip()
