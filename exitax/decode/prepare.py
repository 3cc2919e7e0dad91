"""Parameters as decoding reads them."""

from __future__ import annotations

import enum
from typing import Any

import jax

from exitax.layers import Int8, join_linears, merge_lora, platform, quantise_matrices
from exitax.models import ExitLM, Params


class WeightFormat(enum.Enum):
  """How matrices are kept for decoding."""

  COMPUTE = 'compute'  # In the format of the computation.
  INT8 = 'int8'  # 8 bits and a scale per output channel (vocabulary: per row). Approximate.


def prepare_params(
  model: ExitLM, params: Params, *, weights: WeightFormat = WeightFormat.COMPUTE
) -> Params:
  """Parameters as decoding reads them: one tree per layer, matrices in the format asked for.

  Maps of one input are joined, unless the ambient mesh spreads them over devices. `generate` does
  it on every call; do it once to keep the copy. Does nothing the second time.
  """
  if has_int8(params):
    return params
  prepared = cast_matrices(model, model.unstack(merge_lora(params, model.config.lora)))
  if not platform.partitioned():
    prepared = {name: join_linears(part) for name, part in prepared.items()}
  return quantise_matrices(prepared) if weights is WeightFormat.INT8 else prepared


def cast_matrices(model: ExitLM, params: Params) -> Params:
  """Matrices in the compute dtype; scales, biases and 8-bit values stay as they are."""
  dtype = model.config.precision.dtype

  def cast(path: Any, leaf: jax.Array) -> jax.Array:
    is_matrix = getattr(path[-1], 'key', '') in ('kernel', 'matrix')
    return leaf.astype(dtype) if is_matrix and leaf.dtype != dtype else leaf

  return jax.tree_util.tree_map_with_path(cast, params)


def has_int8(params: Params) -> bool:
  """Whether some array is kept in 8 bits."""
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Int8))
  return any(isinstance(leaf, Int8) for leaf in leaves)
