"""What the devices of a pipeline hand each other beside the stream: exits' features, gradients, parameters.

For use inside `jax.shard_map`, over manual mesh axes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_stages(x: jax.Array, axis: str) -> jax.Array:
  """Every stage's `x`, stacked `[stages, ...]`; differentiable where each stage reads all of them.

  The gradient's parts travel in the dtype of `x` and are added up in at least float32 where they
  arrive. (A reduce-scatter would add them up in that dtype, and XLA's CPU compiler aborts on
  bfloat16 ones of `jax.shard_map`.)
  """
  return jax.lax.all_gather(x, axis)


def _gather_forward(x: jax.Array, axis: str) -> tuple[jax.Array, None]:
  return jax.lax.all_gather(x, axis), None


def _gather_backward(axis: str, _: None, gradient: jax.Array) -> tuple[jax.Array]:
  parts = jax.lax.all_to_all(gradient, axis, split_axis=0, concat_axis=0, tiled=True)
  wide = jnp.promote_types(gradient.dtype, jnp.float32)
  return (jnp.sum(parts.astype(wide), axis=0).astype(gradient.dtype),)


gather_stages.defvjp(_gather_forward, _gather_backward)


def reduce_gradient(
  gradient: jax.Array, spec: PartitionSpec, *, axes: Sequence[str], wire_dtype: DTypeLike
) -> jax.Array:
  """Adds a gradient up over manual mesh axes, each device keeping the part that `spec` gives it.

  Args:
    gradient: this device's part of the sum; whole along dimensions that `spec` shards over one of
      `axes`, except over the pipeline where the parameter itself is cut.
    spec: mesh axes of each dimension.
    axes: axes to add up over.
    wire_dtype: what travels; the result keeps the gradient's own.
  """
  for axis in axes:
    dims = [dim for dim, names in enumerate(spec) if axis in _names(names)]
    sent = gradient.astype(wire_dtype)
    if dims:
      total = jax.lax.psum_scatter(sent, axis, scatter_dimension=dims[0], tiled=True)
    else:
      total = jax.lax.psum(sent, axis)
    gradient = total.astype(gradient.dtype)
  return gradient


def gather_parameter(x: jax.Array, spec: PartitionSpec, *, axis: str) -> jax.Array:
  """A parameter whole along the dimension that `spec` shards over the manual mesh axis `axis`."""
  for dim, names in enumerate(spec):
    if axis in _names(names):
      return jax.lax.all_gather(x, axis, axis=dim, tiled=True)
  return x


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return () if entry is None else (entry,) if isinstance(entry, str) else entry
