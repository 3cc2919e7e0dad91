"""The training step compiled for devices that may not be here, and what the compiler says of it."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from exitax.errors import UserError
from exitax.parallel import Collective, FlopCount, collectives_in, count_jaxpr_flops, use
from exitax.training import Assembly

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class CompiledMemory:
  """Bytes of one device as the compiler has laid them out.

  Attributes:
    arguments: state and batch.
    results: results that do not take the place of an argument.
    temporary: everything that lives within the step.
    code: the program itself.
  """

  arguments: int
  results: int
  temporary: int
  code: int

  @property
  def total(self) -> int:
    """All of it."""
    return self.arguments + self.results + self.temporary + self.code


@dataclasses.dataclass(frozen=True)
class CompiledStep:
  """One compilation.

  Attributes:
    flops: executed by all devices in one step, from the traced program.
    memory: what it takes; None if it did not fit.
    needed: bytes that the compiler says it needed, where it did not fit; else None.
    available: bytes that it says there are, where it did not fit; else None.
    collectives: by kind and mesh axes; empty if it did not fit.
    num_rematerialised: instructions that the compiler computes twice of its own accord, to fit.
    seconds: time to trace and compile.
  """

  flops: FlopCount
  memory: CompiledMemory | None
  needed: int | None
  available: int | None
  collectives: tuple[Collective, ...]
  num_rematerialised: int
  seconds: float


def compile_step(assembly: Assembly) -> CompiledStep:
  """Compiles the step of a run for the devices of its mesh; nothing runs.

  Raises:
    UserError: sizes that do not fit each other.
  """
  start = time.perf_counter()
  with use(assembly.mesh, assembly.config.sharding):
    step = jax.jit(assembly.step, donate_argnums=0)
    traced = step.trace(assembly.abstract_state(), assembly.abstract_batch())
    flops = count_jaxpr_flops(traced.jaxpr.jaxpr)
    try:
      with _no_persistent_cache():
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      needed, available = _out_of_memory(error)
      seconds = time.perf_counter() - start
      return CompiledStep(flops, None, needed, available, (), 0, seconds)
  analysis = compiled.memory_analysis()
  if analysis is None:
    raise UserError('this backend does not tell what memory a program takes')
  memory = CompiledMemory(
    arguments=analysis.argument_size_in_bytes,
    results=max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
    temporary=analysis.temp_size_in_bytes,
    code=analysis.generated_code_size_in_bytes,
  )
  text = compiled.as_text() or ''
  return CompiledStep(
    flops=flops,
    memory=memory,
    needed=None,
    available=None,
    collectives=collectives_in(text, assembly.mesh),
    num_rematerialised=len(re.findall(r'^\s+(?:ROOT )?%[\w.\-]*\.remat', text, re.MULTILINE)),
    seconds=time.perf_counter() - start,
  )


@contextlib.contextmanager
def _no_persistent_cache() -> Iterator[None]:
  """A program for devices that are not here can be written to jax's cache, but not read back."""
  was_enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # It looks at the setting once.
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', was_enabled)
    compilation_cache.reset_cache()


def _out_of_memory(error: Exception) -> tuple[int | None, int | None]:
  """Bytes needed and available, from XLA's message; anything else is raised again."""
  message = str(error)
  if 'RESOURCE_EXHAUSTED' not in message:
    raise error
  number = r'\(?([\d.]+)([KMGT]?)i?B?\)?'
  for pattern in (
    rf'Used {number} of {number} hbm',
    rf'required for [\w ]+{number} exceeds available HBM {number}',
  ):
    if match := re.search(pattern, message):
      first, first_unit, second, second_unit = match.groups()
      return (
        round(float(first) * _UNITS[first_unit]),
        round(float(second) * _UNITS[second_unit]),
      )
  return None, None
