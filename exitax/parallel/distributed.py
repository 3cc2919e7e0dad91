"""Starting jax in several processes as one run, and leaving it."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from exitax.errors import UserError
from exitax.parallel.attendance import decode_entry, encode_entry, make_entry, problem_with
from exitax.parallel.emulation import keep_collectives_in_order
from exitax.parallel.roll_call import hold_roll_call, split_address

# How long a process that ends by an error waits for the others to end as well.
LEAVE_SECONDS = 5.0
# Jobs of a cluster get ports from this range, by their number.
_FIRST_PORT, _NUM_PORTS = 61440, 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessConfig:
  """This process among those of a run.

  Attributes:
    coordinator_address: `host:port` of process 0; None lets jax find it, with the two below.
    num_processes: of the run.
    process_id: this one, from 0.
    roll_call_seconds: how long to wait for all to come.
    heartbeat_seconds: after so long without a sign of life a process counts as dead, and jax ends
      the others.

  Raises:
    UserError: some but not all of the three are given, or a value is out of range.
  """

  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  roll_call_seconds: float = 300.0
  heartbeat_seconds: int = 100

  def __post_init__(self) -> None:
    places = {
      '--coordinator_address': self.coordinator_address,
      '--num_processes': self.num_processes,
      '--process_id': self.process_id,
    }
    absent = [name for name, value in places.items() if value is None]
    if 0 < len(absent) < len(places):
      given = ' and '.join(name for name in places if name not in absent)
      raise UserError(f'{given} without {" and ".join(absent)}: give all three, or none')
    if self.roll_call_seconds <= 0:
      raise UserError(f'--roll_call_seconds={self.roll_call_seconds:g} must be above 0')
    if self.heartbeat_seconds < 1:
      raise UserError(f'--heartbeat_timeout_seconds={self.heartbeat_seconds} must be at least 1')
    if self.num_processes is None or self.process_id is None or self.coordinator_address is None:
      return
    split_address(self.coordinator_address)
    if self.num_processes < 1:
      raise UserError(f'--num_processes={self.num_processes} must be at least 1')
    if not 0 <= self.process_id < self.num_processes:
      raise UserError(
        f'--process_id={self.process_id} is outside 0 to num_processes-1={self.num_processes - 1}'
      )


def join_processes(config: ProcessConfig, *, configuration: Sequence[str]) -> None:
  """Makes jax see the devices of all processes; must come before the first array is made.

  Where the address of process 0 is known a roll-call comes first (see `roll_call`), so that a
  missing or differing process is named. That is so with given addresses and under SLURM. On other
  clusters that jax knows (TPU pods, Open MPI, Kubernetes) only jax knows the address: there the
  comparison comes after the start, and a missing process is jax's to report.

  Args:
    config: this process's place.
    configuration: lines 'name = value' that must be the same in all processes.

  Raises:
    UserError: as `hold_roll_call`; no cluster was found; the processes differ.
  """
  if config.coordinator_address is None:
    config = dataclasses.replace(config, **slurm_place(os.environ))
  if config.num_processes == 1:
    return
  address = config.coordinator_address
  if address is not None and config.process_id is not None and config.num_processes is not None:
    hold_roll_call(
      address,
      process_id=config.process_id,
      num_processes=config.num_processes,
      configuration=configuration,
      seconds=config.roll_call_seconds,
    )
  _initialize(config)
  if address is None:
    _compare(configuration)


def slurm_place(environment: Mapping[str, str]) -> dict[str, object]:
  """Fields of `ProcessConfig` in a job step of SLURM; {} elsewhere.

  Process 0 is the first task on the first node of the step; the port follows from the job's number.
  """
  names = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID')
  if any(name not in environment for name in names):
    return {}
  job, nodes, count, process = (environment[name] for name in names)
  # 'node007', 'node007,other1' or 'node[007-009,012],other1'.
  head, bracket, rest = nodes.partition(',')[0].partition('[')
  first = head + rest.rstrip(']').partition('-')[0] if bracket else head
  return {
    'coordinator_address': f'{first}:{_FIRST_PORT + int(job) % _NUM_PORTS}',
    'num_processes': int(count),
    'process_id': int(process),
  }


def leave(status: int) -> NoReturn:
  """Ends this process of a run that has failed, without waiting for others that never come.

  jax waits at exit until all processes are there, or the heartbeat's timeout. Here those that fail
  together take leave together, and one that fails alone goes after `LEAVE_SECONDS`, so that the
  others notice.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  farewell.start()
  farewell.join(LEAVE_SECONDS)
  os._exit(status)


def _initialize(config: ProcessConfig) -> None:
  # Ours catches SIGTERM and agrees with the others; jax's would take the signal away.
  jax.config.update('jax_enable_preemption_service', False)
  keep_collectives_in_order()
  # For CPU devices; others have collectives of their own.
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  try:
    jax.distributed.initialize(
      config.coordinator_address,
      num_processes=config.num_processes,
      process_id=config.process_id,
      heartbeat_timeout_seconds=config.heartbeat_seconds,
    )
  except ValueError as error:
    raise UserError(
      f'jax finds no cluster here ({str(error).splitlines()[0]}): give --coordinator_address, '
      '--num_processes and --process_id'
    ) from None


def _compare(configuration: Sequence[str]) -> None:
  """The comparison of a roll-call, over the devices."""
  own = encode_entry(
    make_entry(
      process_id=jax.process_index(),
      num_processes=jax.process_count(),
      host=socket.gethostname(),
      configuration=configuration,
    )
  )
  sizes = np.ravel(multihost_utils.process_allgather(np.asarray(len(own), np.int32)))
  padded = np.frombuffer(own.ljust(int(sizes.max())), np.uint8)
  rows = np.asarray(multihost_utils.process_allgather(padded))
  entries = [decode_entry(bytes(row)) for row in rows.reshape(len(sizes), -1)]
  problem = problem_with([entry for entry in entries if entry], address='jax', seconds=0)
  if problem:
    raise UserError(problem)
