"""The one matrix product of every layer, and the module that owns its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from exitax.layers.config import Precision


def project(x: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
  """`x @ kernel` over the last axis of `x`, accumulated in at least float32.

  Args:
    x: `[..., features_in]`.
    kernel: `[features_in, features_out]`.
    precision: format of the operands and of the result.

  Returns:
    `[..., features_out]` in the precision's dtype.
  """
  dtype = precision.dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  x, kernel = x.astype(dtype), kernel.astype(dtype)
  return jnp.matmul(x, kernel, preferred_element_type=wide).astype(dtype)


class Linear(nn.Module):
  """Linear map from the last `len(axes_in)` axes to `features`, e.g. embed -> (heads, kv).

  The kernel keeps its natural shape, so that rules can shard heads, and is multiplied as a matrix.

  Attributes:
    features: sizes of the output axes.
    axes_in: logical names of the input axes.
    axes_out: logical names of the output axes.
    precision: formats of the product.
    init_std: standard deviation of the kernel at initialisation.
    use_bias: whether a bias over the output axes is added.
  """

  features: Sequence[int]
  axes_in: Sequence[str]
  axes_out: Sequence[str]
  precision: Precision
  init_std: float
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    num_in = len(self.axes_in)
    leading, shape_in = x.shape[:-num_in], x.shape[-num_in:]
    shape = (*shape_in, *self.features)
    kernel_init = nn.with_logical_partitioning(
      nn.initializers.normal(self.init_std), (*self.axes_in, *self.axes_out)
    )
    kernel = self.param('kernel', kernel_init, shape)
    matrix = kernel.reshape(math.prod(shape_in), math.prod(self.features))
    y = project(x.reshape(*leading, math.prod(shape_in)), matrix, self.precision)
    y = y.reshape(*leading, *self.features)
    if self.use_bias:
      bias_init = nn.with_logical_partitioning(nn.initializers.zeros, tuple(self.axes_out))
      y = y + self.param('bias', bias_init, tuple(self.features)).astype(y.dtype)
    return y
