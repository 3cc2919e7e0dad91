"""Devices that a step is planned for: here, emulated, or a slice of TPUs that is not here."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from exitax.errors import UserError
from exitax.parallel import (
  CHIPS,
  Chip,
  MeshConfig,
  Topology,
  emulate_devices,
  find_chip,
  has_tpu_compiler,
  make_mesh,
  parse_topology,
  tpu_devices,
)


@dataclasses.dataclass(frozen=True)
class Target:
  """What a plan is for.

  Attributes:
    name: 'v5e:4x4', or what is here, '8 x cpu'.
    devices: the devices, of which a mesh is made.
    chip: their data sheet; None for CPUs and unlisted chips.
    note: what a reader must know of it; empty if nothing.
    topology: the slice; None for devices that are here.
  """

  name: str
  devices: tuple[Any, ...]
  chip: Chip | None
  note: str = ''
  topology: Topology | None = None

  @property
  def platform(self) -> str:
    """What programs are compiled for: 'tpu', 'gpu' or 'cpu'."""
    return self.devices[0].platform

  def one_device(self) -> Mesh:
    """A mesh of one of the devices: what one row costs is traced for it."""
    return make_mesh(MeshConfig(data=1), self.devices[:1])


def find_target(topology: str | None, chip_name: str | None = None) -> Target:
  """Devices by topology, or those that are here; must come before the first array is made.

  Args:
    topology: as `parse_topology`; None takes the devices that are here.
    chip_name: takes this chip's data sheet where devices have none, such as 'TPU v5e'.

  Raises:
    UserError: an unknown topology or chip.
  """
  chip = _chip(chip_name) if chip_name else None
  if topology is None:
    devices = tuple(jax.devices())
    kind = devices[0].device_kind
    return Target(f'{len(devices)} x {kind}', devices, chip or find_chip(kind))
  slice_ = parse_topology(topology)
  if has_tpu_compiler():
    jax.config.update('jax_platforms', 'cpu')  # The host of this program, not of the plan.
    return Target(str(slice_), tuple(tpu_devices(slice_)), slice_.chip, topology=slice_)
  emulate_devices(slice_.num_chips)
  note = (
    'the TPU compiler is not installed (pip install "exitax[plan]"): compiled for '
    f'{slice_.num_chips} emulated CPU devices, whose memory and collectives differ'
  )
  return Target(str(slice_), tuple(jax.devices()), slice_.chip, note, slice_)


def _chip(name: str) -> Chip:
  for chip in CHIPS:
    if chip.name.lower() == name.lower():
      return chip
  raise UserError(f'--chip={name!r} is unknown: choose {", ".join(chip.name for chip in CHIPS)}')
