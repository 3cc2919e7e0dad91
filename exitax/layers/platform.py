"""What the hardware asks of the layers; every choice is made while tracing, none changes the math."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Names that Linux gives to instructions which multiply bfloat16 pairs (x86: AVX-512, AMX; Arm).
_BFLOAT16_FLAGS = frozenset({'avx512_bf16', 'amx_bf16', 'bf16'})


def target() -> str:
  """Platform that the program being traced is for: 'cpu', 'gpu' or 'tpu'.

  The ambient mesh decides, where there is one: its devices may be a slice of TPUs that a program is
  compiled for on a host without any.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def on_cpu() -> bool:
  """Whether the program being traced is for the CPU."""
  return target() == 'cpu'


def partitioned() -> bool:
  """Whether the ambient mesh lets the compiler split arrays over devices.

  False outside a mesh, on a mesh of one device, and where every axis is manual (`jax.shard_map`).
  """
  mesh = jax.sharding.get_abstract_mesh()
  return any(mesh.shape[axis] > 1 for axis in mesh.axis_names if axis not in mesh.manual_axes)


def emulates_bfloat16() -> bool:
  """Whether bfloat16 products are slower than float32 ones: CPUs without instructions for them."""
  return on_cpu() and not _cpu_flags() & _BFLOAT16_FLAGS


def merges_axes(dtype: DTypeLike) -> bool:
  """Whether products run on operands whose leading axes (batch, length) are merged into one.

  Products of rank 2 spare the CPU transposed copies for the weights' gradients. Under a mesh the
  axes stay apart, as batch and length may lie on different mesh axes. So they do for bfloat16 on a
  CPU that has instructions for it: its library takes no transposed operand, and the copy that XLA
  makes for axes that are apart is worth it (527 against 289 GFLOP/s, measured on two cores).
  """
  if partitioned():
    return False
  return dtype != jnp.bfloat16 or not on_cpu() or emulates_bfloat16()


@functools.cache
def _cpu_flags() -> frozenset[str]:
  try:
    lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
  except OSError:
    return frozenset()
  flags = (line.partition(':')[2] for line in lines if line.startswith(('flags', 'Features')))
  return frozenset(next(flags, '').split())
