"""TPU slices by name, and their devices on a host that has none: for compiling ahead of time."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from exitax.errors import UserError
from exitax.parallel.chips import Chip, find_chip

# Generation -> dimensions of its torus, TensorCores of a chip that products' names count.
_GENERATIONS = {'v4': (3, 2), 'v5e': (2, 1), 'v5p': (3, 2), 'v6e': (2, 1)}
_SHAPES = {
  2: ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16'),
  3: ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16'),
}
# Without these libtpu asks a cloud's metadata server which slice it is on, takes a lock that a
# second process then finds taken, and reports on standard error what it did not find.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TPU_MIN_LOG_LEVEL': '3',
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of one TPU generation.

  Attributes:
    generation: 'v4', 'v5e', 'v5p' or 'v6e'.
    shape: chips along each axis of the torus.
    chip: its data sheet.
  """

  generation: str
  shape: tuple[int, ...]
  chip: Chip

  @property
  def num_chips(self) -> int:
    """Chips, which are jax's devices here."""
    return math.prod(self.shape)

  def __str__(self) -> str:
    return f'{self.generation}:{"x".join(map(str, self.shape))}'


def parse_topology(name: str) -> Topology:
  """A slice from 'v5p:4x4x4', or from its product name, 'v5p-128' or 'v5litepod-16'.

  Product names count TensorCores for v4 and v5p, chips for v5e and v6e.

  Raises:
    UserError: no such slice.
  """
  text = name.strip().lower().replace('v5litepod', 'v5e')
  match = re.fullmatch(r'(v\d+[a-z]*)(?::(\d+(?:x\d+)*)|-(\d+))', text)
  if not match or match.group(1) not in _GENERATIONS:
    raise UserError(
      f'topology {name!r} is unknown: write GENERATION:SHAPE, such as v5e:4x4, v6e:8x8 or '
      f'v5p:2x2x4 (generations: {", ".join(_GENERATIONS)})'
    )
  generation, shape, count = match.groups()
  num_dimensions, cores = _GENERATIONS[generation]
  known = _SHAPES[num_dimensions]
  if count:
    by_size = {math.prod(_sizes(shape)): shape for shape in known}
    shape = by_size.get(int(count) // cores) if int(count) % cores == 0 else None
    if shape is None:
      names = ', '.join(f'{generation}-{size * cores}' for size in by_size)
      raise UserError(f'topology {name!r} is no slice: choose {names}')
  sizes = _sizes(shape)
  if len(sizes) != num_dimensions or (num_dimensions == 2 and shape not in known):
    names = ', '.join(f'{generation}:{shape}' for shape in known)
    if len(sizes) == num_dimensions:
      raise UserError(f'topology {name!r} is no slice: choose {names}')
    raise UserError(
      f'topology {name!r}: {generation} is a torus of {num_dimensions} dimensions, choose {names}'
    )
  chip = find_chip(f'TPU {generation}')
  assert chip is not None
  return Topology(generation, sizes, chip)


def larger_slices(topology: Topology) -> tuple[Topology, ...]:
  """The slices of a generation with more chips than one of its slices, smallest first."""
  shapes = (_sizes(shape) for shape in _SHAPES[len(topology.shape)])
  slices = (dataclasses.replace(topology, shape=shape) for shape in shapes)
  return tuple(item for item in slices if item.num_chips > topology.num_chips)


def has_tpu_compiler() -> bool:
  """Whether libtpu, which holds the TPU compiler, is installed."""
  return importlib.util.find_spec('libtpu') is not None


def tpu_devices(topology: Topology) -> list[Any]:
  """Devices of a slice that is not here: to build a mesh of, and to compile for.

  Raises:
    UserError: libtpu is missing or knows no such slice.
  """
  if not has_tpu_compiler():
    raise UserError('the TPU compiler is missing: pip install "exitax[plan]"')
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  options: dict[str, Any] = {}
  if topology.num_chips == 1:
    options['chips_per_host_bounds'] = [1, 1, 1]
  if topology.generation == 'v4':
    options['chip_config_name'] = 'megacore'  # A chip is one device, as on real hosts.
  try:
    description = topologies.get_topology_desc(str(topology), platform='tpu', **options)
  except jax.errors.JaxRuntimeError as error:
    known = _SHAPES[len(topology.shape)]
    raise UserError(
      f'topology {str(topology)!r} is refused ({_first_line(error)}): choose '
      f'{", ".join(f"{topology.generation}:{shape}" for shape in known)}'
    ) from None
  return list(description.devices)


def _sizes(shape: str) -> tuple[int, ...]:
  return tuple(int(size) for size in shape.split('x'))


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0]
