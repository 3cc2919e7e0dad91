"""The one matrix product of every layer, and the module that owns its weights."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from exitax.layers import platform
from exitax.layers.config import Precision
from exitax.layers.int8 import split_scale
from exitax.layers.lora import A, B, LoraConfig, init_a
from exitax.layers.parameter import parameter

# Below so many rows a product is bound by reading its matrix, which must not be widened first.
MIN_ROWS_TO_WIDEN = 64


def project(x: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
  """`x @ kernel` over the last axis of `x`, accumulated in at least float32.

  The gradient's products take operands of the precision's dtype too and accumulate in at least
  float32; the kernel's gradient is never rounded to less.

  Args:
    x: `[..., features_in]`.
    kernel: `[features_in, features_out]`.
    precision: format of the operands and of the result.

  Returns:
    `[..., features_out]` in the precision's dtype.
  """
  if x.ndim <= 2 or not platform.merges_axes(precision.dtype):
    return _project(x, kernel, precision)
  flat: Any = _project(x.reshape(-1, x.shape[-1]), kernel, precision)
  return flat.reshape(*x.shape[:-1], kernel.shape[-1])


def contract(
  a: jax.Array, b: jax.Array, axes: tuple[Sequence[int], Sequence[int]], *, num_batch: int = 0
) -> jax.Array:
  """Sum of products over `axes` of two arrays of one dtype, in at least float32.

  Args:
    a: any shape.
    b: any shape; its first `num_batch` axes are those of `a`.
    axes: the axes of `a` and of `b` that are summed over.
    num_batch: leading axes that stay apart.

  Returns:
    The batch axes, the other axes of `a`, the other axes of `b`; float32 or wider.
  """
  wide = jnp.promote_types(a.dtype, jnp.float32)
  rows = math.prod(size for i, size in enumerate(a.shape) if i not in axes[0])
  if a.dtype == jnp.bfloat16 and rows >= MIN_ROWS_TO_WIDEN and platform.emulates_bfloat16():
    a, b = a.astype(wide), b.astype(wide)  # The same products: bfloat16 pairs are exact in float32.
  batch = tuple(range(num_batch))
  return jax.lax.dot_general(a, b, (axes, (batch, batch)), preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: jax.Array, kernel: jax.Array, precision: Precision) -> jax.Array:
  return _project_forward(x, kernel, precision)[0]


def _project_forward(x: jax.Array, kernel: jax.Array, precision: Precision) -> Any:
  dtype, like_x = precision.dtype, jnp.zeros((), x.dtype)
  x = x.astype(dtype)
  y = contract(x, kernel.astype(dtype), ((x.ndim - 1,), (0,))).astype(dtype)
  # The operand as multiplied is kept: half the memory in bfloat16. The kernel lives anyway.
  return y, (x, kernel, like_x)


def _project_backward(precision: Precision, residuals: Any, gradient: jax.Array) -> Any:
  x, kernel, like_x = residuals
  last = x.ndim - 1
  leading = tuple(range(last))
  d_x = contract(gradient, kernel.astype(precision.dtype), ((last,), (1,)))
  d_kernel = contract(x, gradient, (leading, leading))
  return d_x.astype(like_x.dtype), d_kernel.astype(kernel.dtype)


_project.defvjp(_project_forward, _project_backward)


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
    lora: adapters, if this map is among their targets; merged parameters have none.
  """

  features: Sequence[int]
  axes_in: Sequence[str]
  axes_out: Sequence[str]
  precision: Precision
  init_std: float
  use_bias: bool = False
  lora: LoraConfig | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    num_in = len(self.axes_in)
    leading, shape_in = x.shape[:-num_in], x.shape[-num_in:]
    shape = (*shape_in, *self.features)
    kernel_init = nn.initializers.normal(self.init_std)
    axes = (*self.axes_in, *self.axes_out)
    kernel, scale = split_scale(parameter(self, 'kernel', kernel_init, shape=shape, axes=axes))
    matrix = kernel.reshape(math.prod(shape_in), math.prod(self.features))
    y = project(x.reshape(*leading, math.prod(shape_in)), matrix, self.precision)
    y = y.reshape(*leading, *self.features)
    if scale is not None:  # 8 bits: the scale of an output channel comes out of the sum.
      y = (y * scale.reshape(self.features)).astype(y.dtype)
    if self._is_adapted():
      y = y + self._adapter(x.reshape(*leading, math.prod(shape_in)), shape_in).reshape(y.shape)
    if self.use_bias:
      bias = parameter(self, 'bias', nn.initializers.zeros, shape=self.features, axes=self.axes_out)
      y = y + bias.astype(y.dtype)
    return y

  def _is_adapted(self) -> bool:
    if self.lora is None or self.name not in self.lora.targets:
      return False
    return self.is_initializing() or self.has_variable('params', A)

  def _adapter(self, x: jax.Array, shape_in: Sequence[int]) -> jax.Array:
    """What the adapter adds: `[..., features_in]` to `[..., features_out]`."""
    assert self.lora is not None
    rank = self.lora.rank
    a = parameter(self, A, init_a, shape=(*shape_in, rank), axes=(*self.axes_in, 'lora'))
    b = parameter(
      self, B, nn.initializers.zeros, shape=(rank, *self.features), axes=('lora', *self.axes_out)
    )
    narrow = project(x, a.reshape(-1, rank), self.precision)
    return self.lora.scale * project(narrow, b.reshape(rank, -1), self.precision)
