"""What one span of layers costs for one row, from its traced program: flops, and bytes kept."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from exitax.data import Batch
from exitax.layers import platform
from exitax.models import ExitLM, ModelConfig, Remat, StagePlan
from exitax.objectives import (
  Microbatch,
  ObjectiveConfig,
  SpanObjective,
  VocabPlacement,
  split_shared,
)
from exitax.parallel import PIPELINE_AXIS, Keep, count_flops, residuals_of
from exitax.training import Recompute, recompute_settings


@dataclasses.dataclass(frozen=True)
class SpanCost:
  """One span of consecutive layers, one row.

  Attributes:
    forward_flops: of the forward tick.
    backward_flops: of the backward tick, recomputation included, exits' scores not.
    kept_whole: bytes kept from forward to backward that the tensor axis does not split: the
      residual stream and norms' statistics.
    kept_split: bytes kept that it splits: whatever has heads or mlp channels.
  """

  forward_flops: int
  backward_flops: int
  kept_whole: int
  kept_split: int

  def kept(self, tensor: int, *, sequence_split: bool) -> float:
    """Bytes of one device."""
    return self.kept_split / tensor + self.kept_whole / (tensor if sequence_split else 1)


def span_cost(
  config: ModelConfig, *, num_layers: int, num_taps: int, length: int, recompute: Recompute
) -> SpanCost:
  """What a span costs; call it with one of the devices planned for as ambient mesh.

  Spans of one and of two layers are traced: every further layer costs as much as the second.

  Args:
    config: the model.
    num_layers: layers of the span.
    num_taps: exits that the span has room for.
    length: tokens of the row.
    recompute: what the backward computes again.
  """
  # Cached by what counts: searches vary a configuration's own remat, which is not read.
  config = dataclasses.replace(config, remat=Remat.NONE)
  one, two = (
    traced_cost(config, layers, length, recompute, platform.target()) for layers in (1, 2)
  )
  further = num_layers - 1

  def extrapolated(name: str) -> int:
    first, second = getattr(one, name), getattr(two, name)
    return first + further * (second - first)

  taps = 0
  if recompute_settings(recompute)[0] is Keep.RESIDUALS:
    width = np.dtype(config.precision.dtype).itemsize
    taps = (num_taps - 1) * length * config.embed_dim * width
  return SpanCost(
    forward_flops=extrapolated('forward_flops'),
    backward_flops=extrapolated('backward_flops'),
    kept_whole=extrapolated('kept_whole') + taps,
    kept_split=extrapolated('kept_split'),
  )


@functools.cache
def traced_cost(
  config: ModelConfig, num_layers: int, length: int, recompute: Recompute, target: str
) -> SpanCost:
  """Traces a span with one exit; layers are made for the platform `target`, that of the mesh."""
  assert target == platform.target()
  keep, remat = recompute_settings(recompute)
  model = ExitLM(dataclasses.replace(config, remat=remat))
  plan = StagePlan(num_stages=1, num_chunks=1, cuts=(0, num_layers), depths=(0,))
  program = SpanObjective(model, plan, ObjectiveConfig(), VocabPlacement.STAGE, PIPELINE_AXIS)
  params = jax.tree.map(_in_compute_dtype(config), model.abstract_params())
  shared = split_shared(model, params, VocabPlacement.STAGE)
  blocks = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((num_layers, *x.shape[1:]), x.dtype), params['blocks']
  )
  # Shapes where the structures have arrays.
  row: Any = jax.ShapeDtypeStruct((1, length), jnp.int32)
  weights: Any = jax.ShapeDtypeStruct((1, length), jnp.float32)
  exit_weights: Any = jax.ShapeDtypeStruct((1,), jnp.float32)
  batch = Batch(row, row, row, row, weights=weights)
  microbatch = Microbatch(batch=batch, exit_weights=exit_weights)
  hidden = program.hidden_like(microbatch)

  def stage_fn(microbatch: Microbatch) -> Any:
    span = jnp.zeros((), jnp.int32)
    return lambda blocks, shared, hidden: program.run(blocks, shared, hidden, microbatch, span)

  def forward(blocks: Any, shared: Any, hidden: Any, microbatch: Microbatch) -> Any:
    return stage_fn(microbatch)(blocks, shared, hidden)

  def both(blocks: Any, shared: Any, hidden: Any, microbatch: Microbatch, gradient: Any) -> Any:
    return jax.vjp(stage_fn(microbatch), blocks, shared, hidden)[1](gradient)

  def kept(blocks: Any, shared: Any, hidden: Any, microbatch: Microbatch) -> Any:
    (_, taps), residuals = residuals_of(stage_fn(microbatch), blocks, shared, hidden)
    return taps, residuals

  args = (blocks, shared, hidden, microbatch)
  of_forward = count_flops(forward, *args).flops
  of_both = count_flops(both, *args, jax.eval_shape(forward, *args)).flops
  if keep is Keep.INPUTS:
    kept_leaves = [hidden]
    of_backward = of_both
  else:
    kept_leaves = jax.tree.leaves(jax.eval_shape(kept, *args))
    of_backward = of_both - of_forward
  whole, split = 0, 0
  for leaf in kept_leaves:
    size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    if leaf.shape[-1] in (1, config.embed_dim):
      whole += size
    else:
      split += size
  return SpanCost(of_forward, of_backward, whole, split)


def _in_compute_dtype(config: ModelConfig) -> Any:
  dtype = config.precision.dtype
  return lambda x: jax.ShapeDtypeStruct(x.shape, dtype if x.ndim > 1 else x.dtype)
