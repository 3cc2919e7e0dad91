"""Several linear maps of one input as a single product.

A decoding step multiplies a few rows by every matrix of the model, and each product has a cost of
its own (on a CPU, threads that start and meet again). Three maps of one input that are one matrix
pay it once: 11 % of a step of 8 layers of width 512 on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from exitax.layers.linear import Linear

# Name of the joined map -> the maps that it holds, in order.
_JOINED = {'query_key_value': ('query', 'key', 'value'), 'gate_up': ('gate', 'up')}


def join_linears(params: Any) -> Any:
  """A tree of parameters, of blocks or exit heads, with the maps of one input joined.

  Linears `[features_in, ...]` called as in `apply_linears` become one `[features_in, all features]`;
  everything else is handed through. For devices that hold whole matrices: joined output axes
  cannot be sharded by head.
  """
  if isinstance(params, tuple):
    return tuple(join_linears(item) for item in params)
  if not isinstance(params, dict):
    return params
  node = {name: join_linears(item) for name, item in params.items()}
  for joined, names in _JOINED.items():
    if node.keys() >= set(names):
      node[joined] = _concatenate([node.pop(name) for name in names])
  return node


def apply_linears(module: nn.Module, x: jax.Array, linears: Sequence[Linear]) -> list[jax.Array]:
  """Every linear's map of `x`: as one product if the parameters of `module` hold them joined.

  Args:
    module: the one whose `__call__` this is part of.
    x: `[..., features_in]`.
    linears: named children that read one input axis.

  Returns:
    One `[..., *features]` per linear.
  """
  names = tuple(str(linear.name) for linear in linears)
  joined = next(name for name, parts in _JOINED.items() if parts == names)
  if not module.has_variable('params', joined):
    return [linear(x) for linear in linears]
  sizes = [math.prod(linear.features) for linear in linears]
  first = linears[0]
  product = Linear(
    features=(sum(sizes),),
    axes_in=first.axes_in,
    axes_out=(joined,),
    precision=first.precision,
    init_std=first.init_std,
    use_bias=first.use_bias,
    name=joined,
  )(x)
  stops = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
  return [
    part.reshape(*x.shape[:-1], *linear.features)
    for part, linear in zip(jnp.split(product, stops, axis=-1), linears, strict=True)
  ]


def _concatenate(linears: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  joined = {
    'kernel': jnp.concatenate([x['kernel'].reshape(len(x['kernel']), -1) for x in linears], axis=1)
  }
  if 'bias' in linears[0]:
    joined['bias'] = jnp.concatenate([x['bias'].reshape(-1) for x in linears])
  return joined
