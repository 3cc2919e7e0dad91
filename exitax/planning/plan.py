"""A plan: estimate and compilation of one run's step on a target, as data."""

from __future__ import annotations

import dataclasses
from typing import Any

from exitax.parallel import Schedule, make_mesh, use
from exitax.planning.compiled import CompiledStep, compile_step
from exitax.planning.estimate import Estimate, estimate
from exitax.planning.target import Target
from exitax.training import RunConfig, assemble

# Beyond this share the compiler begins to compute things twice to fit, silently and slowly.
COMFORTABLE = 0.7


@dataclasses.dataclass(frozen=True)
class Plan:
  """One run's step on a target.

  Attributes:
    run: the run.
    target: what it is planned for.
    estimate: by arithmetic.
    compiled: by the compiler; None if it was not asked.
    schedule: the pipeline's table; None on a mesh with one stage.
  """

  run: RunConfig
  target: Target
  estimate: Estimate
  compiled: CompiledStep | None
  schedule: Schedule | None

  @property
  def memory_bytes(self) -> int | None:
    """What a device needs, from the compiler where it tells; None if it did not fit."""
    if self.compiled is None:
      return self.estimate.memory.total
    return self.compiled.memory.total if self.compiled.memory else self.compiled.needed

  @property
  def memory_limit(self) -> int | None:
    """What a device has; None if unknown."""
    if self.compiled and self.compiled.available:
      return self.compiled.available
    return self.target.chip.hbm_bytes if self.target.chip else None

  @property
  def fits(self) -> bool:
    """Whether the step runs; True where the limit is unknown."""
    if self.compiled and self.compiled.memory is None:
      return False
    limit = self.memory_limit
    return limit is None or self.memory_bytes is None or self.memory_bytes <= limit

  @property
  def share(self) -> float | None:
    """Share of the memory that is used; None if unknown."""
    if not self.memory_limit or self.memory_bytes is None:
      return None
    return self.memory_bytes / self.memory_limit

  @property
  def missing_bytes(self) -> int:
    """By how much it does not fit."""
    if self.fits:
      return 0
    needed = self.memory_bytes or self.estimate.memory.total
    return max(0, needed - (self.memory_limit or 0))

  def to_dict(self) -> dict[str, Any]:
    """Plain JSON values."""
    compiled = self.compiled
    chip = self.target.chip
    return {
      'target': self.target.name,
      'compiled_for': self.target.platform if compiled else None,
      'chip': chip.name if chip else None,
      'num_devices': len(self.target.devices),
      'mesh': self.run.mesh.sizes,
      'fits': self.fits,
      'memory_bytes': self.memory_bytes,
      'memory_limit': self.memory_limit,
      'estimate': dataclasses.asdict(self.estimate),
      'step_seconds': self.estimate.time.step if self.estimate.time else None,
      'compiled': dataclasses.asdict(compiled) if compiled else None,
    }


def make_plan(run: RunConfig, target: Target, *, compile: bool = True) -> Plan:
  """Plans a run.

  Raises:
    UserError: a mesh that does not suit devices, model or batch.
  """
  # With what -1 stands for: layouts are described, and written, by their sizes.
  run = dataclasses.replace(run, mesh=run.mesh.resolve(len(target.devices)))
  assembly = assemble(run, make_mesh(run.mesh, target.devices))
  with use(target.one_device(), run.sharding):
    costs = estimate(run, len(target.devices), target.chip)
  schedule = assembly.pipelined.schedule if assembly.pipelined else None
  return Plan(run, target, costs, compile_step(assembly) if compile else None, schedule)
