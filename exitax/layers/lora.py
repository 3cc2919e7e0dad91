"""Low-rank adapters (LoRA, arXiv 2106.09685): `x W + (alpha / rank) (x A) B` beside a frozen `W`.

A linear map that has one keeps `lora_a` `[*in, rank]` and `lora_b` `[rank, *out]` beside its kernel
`[*in, *out]`. Training computes the narrow products; decoding adds them to the kernel first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from exitax.errors import UserError

A, B = LORA_LEAVES = ('lora_a', 'lora_b')
LINEARS = ('query', 'key', 'value', 'output', 'gate', 'up', 'down')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Adapters of the blocks' linear maps; exit heads have none.

  Attributes:
    rank: width of the narrow products.
    alpha: what they add is multiplied by `alpha / rank`.
    targets: which maps: of 'query', 'key', 'value', 'output', 'gate', 'up' and 'down'.

  Raises:
    UserError: a rank or a name that does not exist.
  """

  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = LINEARS

  def __post_init__(self) -> None:
    object.__setattr__(self, 'targets', tuple(self.targets))
    if self.rank < 1:
      raise UserError(f'LoraConfig.rank={self.rank} must be at least 1')
    unknown = [name for name in self.targets if name not in LINEARS]
    if unknown or not self.targets:
      raise UserError(f'LoraConfig.targets={self.targets} must be some of {", ".join(LINEARS)}')

  @property
  def scale(self) -> float:
    """Factor on what an adapter adds."""
    return self.alpha / self.rank


def init_a(
  key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
) -> jax.Array:
  """Uniform within 1 / sqrt(inputs), as PEFT starts `A` (`kaiming_uniform_(a=sqrt(5))`); `B` is zero."""
  del out_sharding  # Of jax's signature of initializers; shardings come with the program.
  bound = 1.0 / math.sqrt(math.prod(shape[:-1]))
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def merge_lora(params: Any, lora: LoraConfig | None) -> Any:
  """Parameters with every adapter added to its kernel and taken away; stacked blocks or not."""
  if lora is None:
    return params
  if isinstance(params, tuple):
    return tuple(merge_lora(item, lora) for item in params)
  if not isinstance(params, dict):
    return params
  node = {name: merge_lora(item, lora) for name, item in params.items()}
  if A in node:
    a, b = node.pop(A), node.pop(B)
    node['kernel'] = _merged(node['kernel'], a, b, lora.scale)
  return node


def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  num_out = kernel.ndim - (a.ndim - 1)
  num_layers = b.ndim - 1 - num_out  # Leading axes: one if blocks are stacked.
  leading = kernel.shape[:num_layers]
  rank = a.shape[-1]
  wide = jnp.promote_types(kernel.dtype, jnp.float32)
  flat_a = a.reshape(*leading, -1, rank).astype(wide)
  flat_b = b.reshape(*leading, rank, -1).astype(wide)
  added = jnp.matmul(flat_a, flat_b, precision=jax.lax.Precision.HIGHEST)
  return (kernel.astype(wide) + scale * added.reshape(kernel.shape)).astype(kernel.dtype)
