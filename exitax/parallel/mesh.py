"""The device mesh: three named axes, `data`, `pipeline` and `tensor`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from exitax.errors import UserError

DATA_AXIS = 'data'
PIPELINE_AXIS = 'pipeline'
TENSOR_AXIS = 'tensor'
MESH_AXES = (DATA_AXIS, PIPELINE_AXIS, TENSOR_AXIS)

WHATEVER_IS_LEFT = -1


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the three mesh axes; one of them may be -1, "whatever is left".

  Attributes:
    data: devices that share the batch (and, under FSDP, the parameters).
    pipeline: stages that share the layers.
    tensor: devices that share heads, mlp and vocabulary; the fastest-varying axis, so that it
      lands on the best-connected neighbours.
  """

  data: int = WHATEVER_IS_LEFT
  pipeline: int = 1
  tensor: int = 1

  @property
  def sizes(self) -> dict[str, int]:
    """Axis name -> size as configured, in mesh order; may hold one -1."""
    return {DATA_AXIS: self.data, PIPELINE_AXIS: self.pipeline, TENSOR_AXIS: self.tensor}

  def resolve(self, num_devices: int) -> MeshConfig:
    """The same mesh with -1 replaced; its product is exactly `num_devices`.

    Raises:
      UserError: an axis size is 0 or below -1, two axes are -1, or the product does not fit.
    """
    self._check_sizes()
    free = [axis for axis, size in self.sizes.items() if size == WHATEVER_IS_LEFT]
    fixed = math.prod(size for size in self.sizes.values() if size != WHATEVER_IS_LEFT)
    if free and num_devices % fixed == 0:
      return dataclasses.replace(self, **{free[0]: num_devices // fixed})
    if free:
      raise UserError(_misfit_with_free_axis(self, free[0], fixed, num_devices))
    if fixed != num_devices:
      raise UserError(_misfit(self, fixed, num_devices))
    return self

  def _check_sizes(self) -> None:
    for axis, size in self.sizes.items():
      if size < 1 and size != WHATEVER_IS_LEFT:
        raise UserError(f'mesh {axis}={size}: choose 1 or more, or -1 for whatever is left')
    free = [f'{axis}=-1' for axis, size in self.sizes.items() if size == WHATEVER_IS_LEFT]
    if len(free) > 1:
      raise UserError(f'mesh {" and ".join(free)}: only one axis can be -1, give the others a size')

  def __str__(self) -> str:
    return ' x '.join(f'{axis}={size}' for axis, size in self.sizes.items())


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh of all `devices` (default: every device of every process), axes of type Auto.

  Devices of a topology description (ahead-of-time compilation) serve as well.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = tuple(config.resolve(len(devices)).sizes.values())
  # A torus of 4 x 4 chips holds axes of 2 only if its own axes may be split.
  grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
  # Meshes default to Explicit axes; the rules here leave placement to the compiler.
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def divisors(number: int) -> list[int]:
  """Every divisor of a positive number, ascending."""
  small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
  return sorted({*small, *(number // d for d in small)})


def join_choices(choices: Sequence[int]) -> str:
  """`[1, 2, 4]` -> '1, 2 or 4'."""
  *head, last = [str(choice) for choice in choices]
  return f'{", ".join(head)} or {last}' if head else last


def _misfit(config: MeshConfig, product: int, num_devices: int) -> str:
  inner = config.pipeline * config.tensor
  fits = inner <= num_devices and num_devices % inner == 0
  fix = (
    f'choose data={num_devices // inner} or data=-1'
    if fits
    else f'choose pipeline x tensor among {join_choices(divisors(num_devices))}, and data=-1'
  )
  return f'mesh {config} = {product} does not match {num_devices} devices: {fix}'


def _misfit_with_free_axis(config: MeshConfig, free: str, fixed: int, num_devices: int) -> str:
  others = ' x '.join(axis for axis in MESH_AXES if axis != free)
  return (
    f'mesh {config}: {others} = {fixed} does not divide {num_devices} devices: '
    f'choose a product of {join_choices(divisors(num_devices))}'
  )
