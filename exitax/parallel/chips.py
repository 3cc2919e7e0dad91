"""Peak rates of accelerator chips, and the measured matmul rate where there is no data sheet."""

from __future__ import annotations

import dataclasses
import time
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

_GIB = 1024**3
_GB = 10**9


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip's data sheet.

  Attributes:
    name: what people call it.
    device_kinds: beginnings of `jax.Device.device_kind`, lower case.
    bf16_flops: dense peak, flop/s.
    hbm_bytes: memory.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s that one link to a neighbour (or to the switch) carries each way.
    num_links: links of a chip: 4 in a 2-D torus, 6 in a 3-D one.
    is_switched: links lead to a switch, so that all of them serve any one peer; else a torus.
    source: where the numbers stand.
  """

  name: str
  device_kinds: tuple[str, ...]
  bf16_flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  link_bandwidth: float
  num_links: int
  source: str
  is_switched: bool = False

  @property
  def ring_bandwidth(self) -> float:
    """Bytes/s that one chip sends in a collective along a mesh axis: a ring, both ways round."""
    return self.link_bandwidth * (self.num_links if self.is_switched else min(2, self.num_links))

  @property
  def neighbour_bandwidth(self) -> float:
    """Bytes/s that one chip sends to the next."""
    return self.link_bandwidth * (self.num_links if self.is_switched else 1)


CHIPS: tuple[Chip, ...] = (
  Chip(
    name='TPU v4',
    device_kinds=('tpu v4',),
    bf16_flops=275e12,
    hbm_bytes=32 * _GIB,
    hbm_bandwidth=1228e9,
    link_bandwidth=50e9,
    num_links=6,
    source='https://cloud.google.com/tpu/docs/v4',
  ),
  Chip(
    name='TPU v5e',
    device_kinds=('tpu v5 lite', 'tpu v5e'),
    bf16_flops=197e12,
    hbm_bytes=16 * _GIB,
    hbm_bandwidth=819e9,
    link_bandwidth=50e9,
    num_links=4,
    source='https://cloud.google.com/tpu/docs/v5e',
  ),
  Chip(
    name='TPU v5p',
    device_kinds=('tpu v5p', 'tpu v5'),
    bf16_flops=459e12,
    hbm_bytes=95 * _GIB,
    hbm_bandwidth=2765e9,
    link_bandwidth=100e9,
    num_links=6,
    source='https://cloud.google.com/tpu/docs/v5p',
  ),
  Chip(
    name='TPU v6e',
    device_kinds=('tpu v6 lite', 'tpu v6e'),
    bf16_flops=918e12,
    hbm_bytes=32 * _GIB,
    hbm_bandwidth=1600e9,
    link_bandwidth=100e9,
    num_links=4,
    source='https://cloud.google.com/tpu/docs/v6e',
  ),
  Chip(
    name='A100 40GB',
    device_kinds=('nvidia a100-sxm4-40gb', 'nvidia a100-pcie-40gb'),
    bf16_flops=312e12,
    hbm_bytes=40 * _GB,
    hbm_bandwidth=1555e9,
    link_bandwidth=25e9,
    num_links=12,
    is_switched=True,
    source='NVIDIA A100 data sheet (without sparsity)',
  ),
  Chip(
    name='A100 80GB',
    device_kinds=('nvidia a100-sxm4-80gb',),
    bf16_flops=312e12,
    hbm_bytes=80 * _GB,
    hbm_bandwidth=2039e9,
    link_bandwidth=25e9,
    num_links=12,
    is_switched=True,
    source='NVIDIA A100 data sheet (without sparsity)',
  ),
  Chip(
    name='A100 80GB PCIe',
    device_kinds=('nvidia a100 80gb pcie',),
    bf16_flops=312e12,
    hbm_bytes=80 * _GB,
    hbm_bandwidth=1935e9,
    link_bandwidth=32e9,
    num_links=1,
    is_switched=True,
    source='NVIDIA A100 data sheet (without sparsity)',
  ),
  Chip(
    name='H100 PCIe',
    device_kinds=('nvidia h100 pcie',),
    bf16_flops=756e12,
    hbm_bytes=80 * _GB,
    hbm_bandwidth=2000e9,
    link_bandwidth=64e9,
    num_links=1,
    is_switched=True,
    source='NVIDIA H100 data sheet (half of the figure with sparsity)',
  ),
  Chip(
    name='H100 SXM',
    device_kinds=('nvidia h100 80gb hbm3',),
    bf16_flops=989e12,
    hbm_bytes=80 * _GB,
    hbm_bandwidth=3350e9,
    link_bandwidth=25e9,
    num_links=18,
    is_switched=True,
    source='NVIDIA H100 data sheet (half of the figure with sparsity)',
  ),
  Chip(
    name='H200 SXM',
    device_kinds=('nvidia h200',),
    bf16_flops=989e12,
    hbm_bytes=141 * _GB,
    hbm_bandwidth=4800e9,
    link_bandwidth=25e9,
    num_links=18,
    is_switched=True,
    source='NVIDIA H200 data sheet (half of the figure with sparsity)',
  ),
)


def find_chip(device_kind: str) -> Chip | None:
  """The chip whose `device_kinds` fits best (longest), or None: CPUs and unlisted chips."""
  kind = device_kind.lower()
  fits = [(len(start), chip) for chip in CHIPS for start in chip.device_kinds if _fits(kind, start)]
  return max(fits, key=lambda fit: fit[0])[1] if fits else None


class HasDeviceKind(Protocol):
  """A `jax.Device`, or a device of a topology that is not here."""

  @property
  def device_kind(self) -> str:
    """Name of the hardware."""
    ...


def peak_flops(device: HasDeviceKind) -> float | None:
  """Dense bf16 peak of the device in flop/s; None if unknown, then measure."""
  chip = find_chip(device.device_kind)
  return chip.bf16_flops if chip else None


def measure_matmul_flops(dtype: jax.typing.DTypeLike, *, seconds: float = 0.3) -> float:
  """Best measured rate of a square matmul on the first local device, flop/s.

  Takes about `seconds` and a compilation. The best of several repeats counts, since everything
  that disturbs a measurement makes it slower. Accumulates in fp32, as the layers do.
  """
  size = 1024
  device = jax.local_devices()[0]
  best = float('inf')
  # A mesh of its own: under an ambient one, jit asks for arrays on all of that mesh's devices.
  with jax.set_mesh(Mesh([device], ('measured',))):
    ones = jax.device_put(jnp.ones((size, size), dtype), device)
    matmul = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    matmul(ones, ones).block_until_ready()
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == float('inf'):
      start = time.perf_counter()
      matmul(ones, ones).block_until_ready()
      best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def _fits(kind: str, start: str) -> bool:
  """Equal, or continued by a new word: 'tpu v5' must not claim a future 'tpu v5x'."""
  return kind == start or kind.startswith(start + ' ')
